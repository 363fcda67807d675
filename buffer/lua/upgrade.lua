-- Rank the items of format 1, which ranked all prompts together by raw log-reward, as format 2 does.
-- A client that came later, or lost our answer, finds nothing to do.
if call('HGET', key('meta'), 'format') ~= '1' then return 0 end
for _, prompt in ipairs(call('HKEYS', key('revision'))) do rank(prompt) end
call('HSET', key('meta'), 'format', '2')
return 1
