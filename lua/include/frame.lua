-- include/frame: what a script may know of a frame. Layout: docs/WIRE_FORMAT.md section 2; positions here count from 1.
--
-- A script is total over arbitrary bytes: an error after the first write does not roll back, so a frame that was popped
-- when Lua raised would be gone; and two truncated frames slice to the same name and would overwrite each other in a
-- hash. So no part of a frame is used before `frame` has accepted it. It checks what scripts rely on (magic, version,
-- the digits and separators from base to total, the end of the header); all else is the worker's CRC.
--
-- Cost: Redis >= 7 hashes every byte of every string that Lua makes (1.3 ns a byte), and a pattern costs 10 ns a
-- character; so no pattern runs over a header and no string is made that is not needed. The middle of the header
-- (`.000.0001.00000 0001 `) takes few values: it is matched once for each, and looked up or compared afterwards.
local sub, byte, match, find = string.sub, string.byte, string.match, string.find
local tonumber, floor = tonumber, math.floor

local frame_n, frame_base, frame_total = {}, {}, {}
local frame_lane = {}
local last_middle, last_n, last_base, last_total = '\n', nil, nil, nil

-- Whether it is a middle field; then it is the last one now.
local function frame_middle(middle)
  local n = frame_n[middle]
  if n == nil then
    local base, jobs, total = match(middle, '^%.(%d%d%d)%.(%d%d%d%d)%.%d%d%d%d%d (%d%d%d%d) $')
    base, n, total = tonumber(base), tonumber(jobs), tonumber(total)
    if not base or n < 1 or total > 1000 or base + n > total then
      n = false
    end
    frame_n[middle], frame_base[middle], frame_total[middle] = n, base, total
  end
  if n then
    last_middle, last_n, last_base, last_total = middle, n, frame_base[middle], frame_total[middle]
  end
  return n
end

-- f -> n, base, total | nil, 'damaged' | nil, 'newer'
local function frame(f)
  local magic, version, flags, space = byte(f, 1, 4)
  if magic == 70 and space == 32 and version == 49 and flags >= 64 and flags < 96 and byte(f, 128) == 10 then
    if #f < 1000 and find(f, last_middle, 31, true) == 31 or frame_middle(sub(f, 31, 51)) then
      return last_n, last_base, last_total
    end
  end
  if magic == 70 and version ~= 49 and find(f, '^%w', 2) then
    return nil, 'newer'
  end
  return nil, 'damaged'
end

-- Name of the lease of an accepted frame.
local function lease_of(f)
  return sub(f, 5, 45)
end

-- Name of the lane in an accepted frame, false if it is no name.
local function lane_of(f)
  local field = sub(f, 79, 96)
  local lane = frame_lane[field]
  if lane == nil then
    lane = match(field, '^ ([a-z0-9_-]+) * $') or false
    frame_lane[field] = lane
  end
  return lane
end

-- Time of entry in us. The CRC leaves it out, so it may be damaged: then the frame counts as the oldest.
local function enqueued_of(f)
  local digits = sub(f, 112, 127)
  return not find(digits, '%D') and tonumber(digits) or 0
end

-- Score of an accepted frame in a sorted set.
local function score_of(f)
  local boost = sub(f, 66, 78)
  return enqueued_of(f) - (not find(boost, '%D') and tonumber(boost) or 0)
end

-- The frame with another time of entry (16 digits).
local function enqueued_at(f, now_us)
  return sub(f, 1, 111) .. now_us .. sub(f, 128)
end
