-- promote: put delayed frames whose time has come into their lanes.
--
-- KEYS[1]   void        never exists
-- KEYS[2]   delayed     zset, frame -> due in ms
-- KEYS[3]   depth       hash
-- KEYS[4]   quarantine  list
-- KEYS[5]   parked      list
-- KEYS[6]   stats       hash
-- KEYS[7..] queue:<lane>, wake:<lane> for each lane
-- ARGV[1]   frames_max  int
-- ARGV[2]   bytes_max   int, a first frame is always taken
-- ARGV[3..] lane        name for each lane
-- moves     scheduled | retrying -> queued
-- returns   {now_us, jobs moved, frames moved, due in ms of the next one or 0, name of each lane that KEYS lacks}
-- cost      O(frames * log(delayed))
-- oom:      runs
--
-- Due frames of other lanes stay and are looked past, so that they cannot block the rest; the caller comes again with
-- their lanes.
--@include frame
--@include bulk
--@include now
--@include wake
local now_us, now_number, now_ms = now()
local due_limit = string.format('%.0f', now_ms)
local frames_left, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2])
local lane_frames, lane_jobs, lane_number = {}, {}, {}
for lane = 1, #ARGV - 2 do
  lane_number[ARGV[lane + 2]] = lane
  lane_frames[lane], lane_jobs[lane] = {}, 0
end
local damaged, newer, missing, missing_names = {}, {}, {}, {}
local moved_jobs, moved_frames, stay = 0, 0, 0

-- Where one frame goes: true if it leaves `delayed`, false if it stays, nil if the budget is full.
local function place(f)
  local n, verdict = frame(f)
  if not n then
    local aside = verdict == 'newer' and newer or damaged
    aside[#aside + 1] = f
    return true
  end
  local name = lane_of(f)
  if not name then
    damaged[#damaged + 1] = f
    return true
  end
  local lane = lane_number[name]
  if not lane then
    if not missing[name] then
      missing[name] = true
      missing_names[#missing_names + 1] = name
    end
    return false
  end
  if #f > bytes_left and moved_frames > 0 then
    return nil
  end
  bytes_left = bytes_left - #f
  local frames = lane_frames[lane]
  frames[#frames + 1] = enqueued_at(f, now_us)
  lane_jobs[lane] = lane_jobs[lane] + n
  moved_jobs, moved_frames = moved_jobs + n, moved_frames + 1
  return true
end

redis.call('DEL', KEYS[1])
local chunk = 4
while frames_left > 0 do
  chunk = math.min(chunk * 4, frames_left)
  local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', due_limit, 'LIMIT', stay, chunk)
  local gone, full = {}, false
  for j = 1, #due do
    local leaves = place(due[j])
    if leaves == nil then
      full = true
      break
    elseif leaves then
      gone[#gone + 1] = due[j]
    end
  end
  bulk('ZREM', KEYS[2], gone)
  if full then
    break
  end
  stay = stay + #due - #gone
  frames_left = frames_left - #due
  if #due < chunk then
    break
  end
end

for lane, frames in ipairs(lane_frames) do
  if #frames > 0 then
    bulk('RPUSH', KEYS[5 + 2 * lane], frames)
    redis.call('HINCRBY', KEYS[3], ARGV[2 + lane], lane_jobs[lane])
    wake(KEYS[6 + 2 * lane], #frames)
  end
end
bulk('RPUSH', KEYS[4], damaged)
bulk('RPUSH', KEYS[5], newer)
if #damaged > 0 then
  redis.call('HINCRBY', KEYS[6], 'quarantined', #damaged)
end
if #newer > 0 then
  redis.call('HINCRBY', KEYS[6], 'parked', #newer)
end
local next_due = redis.call('ZRANGE', KEYS[2], stay, stay, 'WITHSCORES')[2]
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('HDEL', KEYS[3], 'delayed')
elseif moved_jobs > 0 then
  redis.call('HINCRBY', KEYS[3], 'delayed', -moved_jobs)
end
return {now_number, moved_jobs, moved_frames, floor(tonumber(next_due) or 0), unpack(missing_names)}
