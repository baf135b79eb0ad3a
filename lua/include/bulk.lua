-- include/bulk: one command with many arguments, in chunks: unpack beyond some 8,000 items kills a script.
-- The chunk is even, so that pairs stay together.
local call = redis.call
local unpack = unpack

local function bulk(name, key, list)
  local size = #list
  if size == 0 then
    return
  end
  if size <= 2000 then
    call(name, key, unpack(list))
    return
  end
  for first = 1, size, 2000 do
    local last = first + 1999
    if last > size then
      last = size
    end
    call(name, key, unpack(list, first, last))
  end
end

-- Values of the hash's fields in order, false where there is none.
local function values(key, fields)
  local size = #fields
  if size <= 2000 then
    return call('HMGET', key, unpack(fields))
  end
  local all = {}
  for first = 1, size, 2000 do
    local last = first + 1999
    if last > size then
      last = size
    end
    local some = call('HMGET', key, unpack(fields, first, last))
    for j = 1, #some do
      all[first + j - 1] = some[j]
    end
  end
  return all
end
