-- Expire what is too old; then draw the freshest groups, all of `num_groups` or none.
-- ARGV: num_groups version max_age max_draws
-- Returns {eligible, {seq, payload, ...}}
local num_groups, version = tonumber(ARGV[1]), tonumber(ARGV[2])
local max_age, max_draws = tonumber(ARGV[3]), tonumber(ARGV[4])
if call('HGET', key('meta'), 'version') ~= ARGV[2] then
  call('HSET', key('meta'), 'version', ARGV[2])
end
local old = call('ZRANGE', key('fresh'), '-inf', '(' .. (version - max_age), 'BYSCORE')
for _, seq in ipairs(old) do forget_group(seq) end
count('groups_expired', #old)

local eligible = call('ZCARD', key('fresh'))
if eligible < num_groups then return {eligible, {}} end
local drawn = {}
for _, seq in ipairs(call('ZRANGE', key('fresh'), 0, num_groups - 1, 'REV')) do
  drawn[#drawn + 1] = seq
  drawn[#drawn + 1] = call('HGET', key('groups'), seq) or ''
  call('ZREM', key('undrawn'), seq)
  if call('HINCRBY', key('draws'), seq, 1) >= max_draws then
    forget_group(seq)
    count('groups_exhausted', 1)
  end
end
count('groups_drawn', num_groups)
return {eligible, drawn}
