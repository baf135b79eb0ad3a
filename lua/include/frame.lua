-- include/frame: what a script may know of a frame. Layout: docs/WIRE_FORMAT.md section 2; positions here count from 1.
--
-- A script is total over arbitrary bytes: an error after the first write does not roll back, so a frame that was popped
-- when Lua raised would be gone; and two truncated frames slice to the same name and would overwrite each other in a
-- hash. So no part of a frame is used before `frame` has accepted it. It checks what scripts rely on (magic, version,
-- the digits and separators from base to total, the end of the header); all else is the worker's CRC.
--
-- The middle of the header (`.000.0001.00000 0001 `) takes few values, so it is matched once for each value and looked
-- up afterwards: a pattern over the whole header costs 2 us a frame, the look-up 0.2 us.
local sub, byte, match, find, rep = string.sub, string.byte, string.match, string.find, string.rep
local tonumber, floor = tonumber, math.floor

local frame_n, frame_base, frame_total, frame_start, frame_lane = {}, {}, {}, {}, {}

-- n of the middle field, false if it is no middle field.
local function frame_middle(middle)
  local base, n, total = match(middle, '^%.(%d%d%d)%.(%d%d%d%d)%.%d%d%d%d%d (%d%d%d%d) $')
  base, n, total = tonumber(base), tonumber(n), tonumber(total)
  if not base or n < 1 or total > 1000 or base + n > total then
    n = false
  end
  frame_n[middle], frame_base[middle], frame_total[middle] = n, base, total
  return n
end

-- f -> lease name, n, base, total | nil, 'damaged' | nil, 'newer'
local function frame(f)
  local start, middle = sub(f, 1, 4), sub(f, 31, 51)
  local known, n = frame_start[start], frame_n[middle]
  if known == nil then
    known = find(start, '^F1[@-_] $') ~= nil
    frame_start[start] = known
  end
  if n == nil then
    n = frame_middle(middle)
  end
  if known and n and byte(f, 128) == 10 then
    return sub(f, 5, 45), n, frame_base[middle], frame_total[middle]
  end
  if find(start, '^F[%w]') and not find(start, '^F1') then
    return nil, 'newer'
  end
  return nil, 'damaged'
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
