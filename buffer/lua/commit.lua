-- Carry out a plan for one prompt, and queue its group, if the prompt is still at `revision`.
-- ARGV: prompt revision capacity keep_stored
--       offered duplicates near_rejected near_replaced evicted_quota
--       num_removed id*  num_put (id log-reward payload duplicates near_replaced)*
--       and for a group: digest version max_age fresh_capacity num_remembered payload
-- Returns {'conflict'} | {'repeated'} | {'none' | 'queued' | 'expired', evicted_capacity}
local prompt, revision, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3])
local removed_at = 11
local put_at = removed_at + tonumber(ARGV[10]) + 1
local num_put = tonumber(ARGV[put_at - 1])
local group_at = put_at + 5 * num_put
local digest = ARGV[group_at]

-- A client that lost our answer sends the same group again; it must not count twice.
if digest and call('ZSCORE', key('accepted'), digest) then return {'repeated'} end
if (call('HGET', key('revision'), prompt) or '0') ~= revision then return {'conflict'} end

for i = removed_at, put_at - 2 do forget_item(ARGV[i], prompt) end
for i = put_at, group_at - 1, 5 do
  local id, log_reward = ARGV[i], ARGV[i + 1]
  call('HSET', key('payload'), id, ARGV[i + 2])
  call('ZADD', items_of(prompt), log_reward, id)
  call('HINCRBY', key('revision'), prompt, 1)
  if ARGV[i + 3] ~= '0' then call('HINCRBY', key('duplicates'), id, ARGV[i + 3]) end
  if ARGV[i + 4] ~= '0' then call('HINCRBY', key('near_replaced'), id, ARGV[i + 4]) end
end
rank(prompt)
local evicted = math.max(call('ZCARD', key('priority')) - capacity, 0)
if ARGV[4] == '1' then
  evicted = math.min(evicted, num_put)
  for i = 1, evicted do forget_item(ARGV[group_at - 5 * i], prompt) end
  rank(prompt)
elseif evicted > 0 then
  for _, worst in ipairs(call('ZRANGE', key('priority'), 0, evicted - 1)) do
    forget_item(string.sub(worst, 1, 32), string.sub(worst, 33))
  end
end
for i, name in ipairs({'offered', 'duplicates', 'near_rejected', 'near_replaced', 'evicted_quota'}) do
  count(name, ARGV[4 + i])
end
count('evicted_capacity', evicted)
if not digest then return {'none', evicted} end

local version, max_age = tonumber(ARGV[group_at + 1]), tonumber(ARGV[group_at + 2])
local fresh_capacity, remembered = tonumber(ARGV[group_at + 3]), tonumber(ARGV[group_at + 4])
local number = call('HINCRBY', key('meta'), 'groups_accepted', 1)
call('ZADD', key('accepted'), number, digest)
call('ZREMRANGEBYRANK', key('accepted'), 0, -remembered - 1)
local drawn_at = tonumber(call('HGET', key('meta'), 'version') or version)
if drawn_at - version > max_age then
  count('groups_expired', 1)
  return {'expired', evicted}
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
return {'queued', evicted}
