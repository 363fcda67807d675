-- The completions in the replay of one prompt as of one instant, without the rest of the records.
-- ARGV: prompt shortest longest
-- Returns {revision, {id, log-reward, ...}, {tokens | '' | nil, ...}}: '' where the length lies
-- outside the two, nil for what is gone or cannot be read. Lengths from above to below read nothing.
local prompt, shortest, longest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local function completion(record)
  local at, _, _, _, sizes = cmsgpack.unpack_limit(record, 4, 1)
  if sizes[3] < shortest or sizes[3] > longest then return '' end
  local begin, last = block(record, at)
  begin = begin + 4 * (sizes[1] + sizes[2])
  local tokens = string.sub(record, begin, begin + 4 * sizes[3] - 1)
  if begin + #tokens > last + 1 or #tokens ~= 4 * sizes[3] then error('tokens are missing') end
  return tokens
end

local ranked = call('ZRANGE', items_of(prompt), 0, -1, 'WITHSCORES')
local completions = {}
for i = 1, #ranked, 2 do
  local readable, tokens = true, ''
  if shortest <= longest then
    local record = call('HGET', key('payload'), ranked[i])
    readable, tokens = pcall(completion, record)
  end
  completions[#completions + 1] = readable and tokens
end
return {call('HGET', key('revision'), prompt) or '0', ranked, completions}
