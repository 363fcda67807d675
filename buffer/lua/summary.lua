-- The small fields of stored trajectories, without their rows of numbers.
-- ARGV: id*
-- Returns {msgpack of {task, prompt key, length, from tool, log-reward, version, time, correct} | nil,
--          ...}; nil for what is gone or cannot be read.

local function summary(payload)
  local at, _, task, prompt, sizes = cmsgpack.unpack_limit(payload, 4, 1)
  local _, integers_end = block(payload, at)
  local tool_at, tool_end = block(payload, integers_end)
  local logs_at, logs_end = block(payload, tool_end)
  local log_reward = struct.unpack('<f', payload, logs_at + 4 * (sizes[4] - 1))
  local inserted = string.find(payload, '\1', tool_at, true) or #payload
  local _, version, _, _, _, created_s, correct = cmsgpack.unpack_limit(payload, 6, logs_end)
  if type(correct) ~= 'boolean' then correct = 'unknown' end
  return cmsgpack.pack({
    task, prompt, sizes[3], inserted <= tool_end, log_reward, version, created_s, correct,
  })
end

local summaries = {}
for i, id in ipairs(ARGV) do
  local payload = call('HGET', key('payload'), id)
  local readable, packed = false, nil
  if payload then readable, packed = pcall(summary, payload) end
  summaries[i] = readable and packed
end
return summaries
