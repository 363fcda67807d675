-- The replay of one prompt as of one instant.
-- ARGV: prompt.  Returns {revision, {id, log-reward, ...}, {payload | nil, ...}}
local ranked = call('ZRANGE', items_of(ARGV[1]), 0, -1, 'WITHSCORES')
local payloads = {}
for i = 1, #ranked, 2 do payloads[#payloads + 1] = call('HGET', key('payload'), ranked[i]) end
return {call('HGET', key('revision'), ARGV[1]) or '0', ranked, payloads}
