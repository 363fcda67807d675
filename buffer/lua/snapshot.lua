-- The whole buffer as of one instant, for the audit.
-- Returns {meta, payload, priority, fresh, undrawn, groups, draws, sampled, duplicates,
--          near_replaced, {prompt, {id, log-reward, ...}, ...}},
-- each hash and zset as a flat list.
local prompts = {}
for _, prompt in ipairs(call('HKEYS', key('revision'))) do
  prompts[#prompts + 1] = prompt
  prompts[#prompts + 1] = call('ZRANGE', items_of(prompt), 0, -1, 'WITHSCORES')
end
return {
  call('HGETALL', key('meta')),
  call('HGETALL', key('payload')),
  call('ZRANGE', key('priority'), 0, -1, 'WITHSCORES'),
  call('ZRANGE', key('fresh'), 0, -1, 'WITHSCORES'),
  call('ZRANGE', key('undrawn'), 0, -1, 'WITHSCORES'),
  call('HGETALL', key('groups')),
  call('HGETALL', key('draws')),
  call('HGETALL', key('sampled')),
  call('HGETALL', key('duplicates')),
  call('HGETALL', key('near_replaced')),
  prompts,
}
