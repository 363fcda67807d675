-- Take unreadable bytes out of the way and keep them as evidence.
-- ARGV: 'item' id prompt max_kept | 'group' seq bytes max_kept
local evidence
if ARGV[1] == 'item' then
  if not call('ZSCORE', items_of(ARGV[3]), ARGV[2]) then return 0 end
  evidence = call('HGET', key('payload'), ARGV[2]) or ''
  forget_item(ARGV[2], ARGV[3])
  rank(ARGV[3])
  count('quarantined', 1)
else
  evidence = ARGV[3]
  -- Its last draw has already counted it as exhausted.
  if not call('ZSCORE', key('fresh'), ARGV[2]) then count('groups_exhausted', -1) end
  forget_group(ARGV[2])
  count('groups_quarantined', 1)
end
if call('HLEN', key('quarantine')) < tonumber(ARGV[4]) then
  call('HSET', key('quarantine'), ARGV[1] .. ':' .. ARGV[2], evidence)
end
return 1
