-- Shared by every script below it: key names, the ranking and the two ways of forgetting.
-- KEYS[1] is the run's prefix. It is a hash tag, so that all keys built from it share one slot.
local call = redis.call
local function key(name) return KEYS[1] .. ':' .. name end
local function items_of(prompt) return key('prompt:' .. prompt) end
local function count(name, amount)
  if tonumber(amount) ~= 0 then call('HINCRBY', key('meta'), name, amount) end
end

-- A change to a prompt's items moves its revision, which fails every plan made before it.
local function forget_item(id, prompt)
  call('ZREM', items_of(prompt), id)
  call('ZREM', key('priority'), id .. prompt)
  call('HDEL', key('payload'), id)
  call('HDEL', key('sampled'), id)
  call('HDEL', key('duplicates'), id)
  call('HDEL', key('near_replaced'), id)
  call('HINCRBY', key('revision'), prompt, 1)
end

-- Give a prompt's items their place in the global ranking: how far each is below the best of the
-- prompt, which itself stands above everything. To be called after any other change than eviction.
local function rank(prompt)
  local items = call('ZRANGE', items_of(prompt), 0, -1, 'WITHSCORES')
  for first = 1, #items, 1000 do  -- Lua unpacks no more than some thousands at once
    local ranks = {}
    for i = first, math.min(first + 999, #items), 2 do
      local is_best = i == #items - 1
      ranks[#ranks + 1] = is_best and '+inf' or string.format('%.17g', items[i + 1] - items[#items])
      ranks[#ranks + 1] = items[i] .. prompt
    end
    call('ZADD', key('priority'), unpack(ranks))
  end
end

local function forget_group(seq)
  call('ZREM', key('fresh'), seq)
  call('ZREM', key('undrawn'), seq)
  call('HDEL', key('groups'), seq)
  call('HDEL', key('draws'), seq)
end

-- Where the block of bytes after byte `at` of a msgpack record begins and ends, counted from 1;
-- cmsgpack knows no binary.
local function block(record, at)
  local kind, begin, size = string.byte(record, at + 1)
  if kind == 0xc4 then begin, size = at + 3, string.byte(record, at + 2)
  elseif kind == 0xc5 then begin, size = at + 4, struct.unpack('>H', record, at + 2)
  elseif kind == 0xc6 then begin, size = at + 6, struct.unpack('>I4', record, at + 2)
  else error('not a block of bytes') end
  return begin, begin + size - 1
end
