-- Carry out a plan for one prompt, and queue its group, if the prompt is still at `revision`.
-- ARGV: prompt revision capacity offered duplicates near_rejected near_replaced evicted_quota
--       num_removed id*  num_put (id log-reward payload duplicates near_replaced)*
--       and for a group: digest version max_age fresh_capacity num_remembered payload
-- Returns {'conflict'} | {'repeated'} | {'done', evicted_capacity, 'none' | 'queued' | 'expired'}
local prompt, revision, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3])
local removed_at = 10
local put_at = removed_at + tonumber(ARGV[9]) + 1
local group_at = put_at + 5 * tonumber(ARGV[put_at - 1])
local digest = ARGV[group_at]

-- A client that lost our answer sends the same group again; it must not count twice.
if digest and call('ZSCORE', key('accepted'), digest) then return {'repeated'} end
if (call('HGET', key('revision'), prompt) or '0') ~= revision then return {'conflict'} end

for i = removed_at, put_at - 2 do forget_item(ARGV[i], prompt) end
for i = put_at, group_at - 1, 5 do
  local id, log_reward = ARGV[i], ARGV[i + 1]
  call('HSET', key('payload'), id, ARGV[i + 2])
  call('ZADD', items_of(prompt), log_reward, id)
  call('ZADD', key('priority'), log_reward, id .. prompt)
  call('HINCRBY', key('revision'), prompt, 1)
  if ARGV[i + 3] ~= '0' then call('HINCRBY', key('duplicates'), id, ARGV[i + 3]) end
  if ARGV[i + 4] ~= '0' then call('HINCRBY', key('near_replaced'), id, ARGV[i + 4]) end
end
local evicted = 0
while call('ZCARD', key('priority')) > capacity do
  local worst = call('ZRANGE', key('priority'), 0, 0)[1]
  forget_item(string.sub(worst, 1, 32), string.sub(worst, 33))
  evicted = evicted + 1
end
for i, name in ipairs({'offered', 'duplicates', 'near_rejected', 'near_replaced', 'evicted_quota'}) do
  count(name, ARGV[3 + i])
end
count('evicted_capacity', evicted)
if not digest then return {'done', evicted, 'none'} end

local version, max_age = tonumber(ARGV[group_at + 1]), tonumber(ARGV[group_at + 2])
local fresh_capacity, remembered = tonumber(ARGV[group_at + 3]), tonumber(ARGV[group_at + 4])
local number = call('HINCRBY', key('meta'), 'groups_accepted', 1)
call('ZADD', key('accepted'), number, digest)
call('ZREMRANGEBYRANK', key('accepted'), 0, -remembered - 1)
local drawn_at = tonumber(call('HGET', key('meta'), 'version') or version)
if drawn_at - version > max_age then
  count('groups_expired', 1)
  return {'done', evicted, 'expired'}
end
-- Fixed width: groups of one version sort by arrival.
local seq = string.format('%016d', number)
call('HSET', key('groups'), seq, ARGV[group_at + 5])
call('ZADD', key('fresh'), version, seq)
call('ZADD', key('undrawn'), version, seq)
while call('ZCARD', key('fresh')) > fresh_capacity do
  forget_group(call('ZRANGE', key('fresh'), 0, 0)[1])
  count('groups_dropped', 1)
end
return {'done', evicted, 'queued'}
