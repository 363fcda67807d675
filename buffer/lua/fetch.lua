-- Payloads of items that were drawn, counting the draw; nil for those gone meanwhile.
-- ARGV: id*.  Returns {payload | nil, ...}
local payloads = {}
for i, id in ipairs(ARGV) do
  payloads[i] = call('HGET', key('payload'), id)
  if payloads[i] then call('HINCRBY', key('sampled'), id, 1) end
end
return payloads
