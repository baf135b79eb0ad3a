-- enqueue: accept submitted frames, each exactly once.
--
-- KEYS[1]    stats       hash
-- KEYS[2]    depth       hash
-- KEYS[3]    delayed     zset, frame -> due in ms
-- KEYS[4..]  queue:<lane>, wake:<lane> for each lane; then job:<bucket> for each bucket; then idem:<key> for each key
-- ARGV[1]    lanes       int, number of pairs in KEYS
-- ARGV[2]    buckets     int
-- ARGV[3]    open_ttl_s  int, how long a bucket outlives its latest due time while a job of it is open
-- ARGV[4..]  groups, of one of two forms, until the end; lane, bucket and key are numbers from 1 in their part of KEYS:
--            'G', lane, bucket (0: untracked), due, value, m, frame * m
--            'K', lane, bucket, due, value, key, '<job id> <hash>', ttl_s, frame of one
--            due is '0' | '+<ms>' from now | '=<ms>' since 1970; value is the snapshot that all frames of the group share
-- moves      - -> queued | scheduled
-- returns    {now_us, answer of each group}: 1 created, now or by an earlier copy of this very call; or for a duplicate
--            the value that the key holds. Error FULL: Redis has no memory, nothing was done. Error BAD: not frames of
--            one lane, fresh and whole, nothing was done
-- cost       O(frames)
-- oom:       refused
--
-- All reads and checks come first. A repeat is recognised by its snapshot field or by its key holding its own job id.
--@include int
--@include frame
--@include bulk
--@include now
--@include wake
--@include snapshot
local stats, depth, delayed = KEYS[1], KEYS[2], KEYS[3]
local argv, size = ARGV, #ARGV
local lanes, buckets, open_ttl_s = int(ARGV[1], 1e3), int(ARGV[2], 1e4), int(ARGV[3], 1e10)
local now_us, now_number, now_ms = now()
if not (lanes and buckets and open_ttl_s and KEYS[3 + 2 * lanes + buckets]) then
  return redis.error_reply('BAD keys')
end

local reply = {now_number}
local created, duplicates = 0, 0
local lane_frames, lane_jobs, lane_name = {}, {}, {}
local late, late_jobs = {}, 0
local bucket_fields, bucket_open, bucket_due = {}, {}, {}
local key_held, key_sets = {}, {}

local function bucket_key(bucket)
  return KEYS[3 + 2 * lanes + bucket]
end

-- due as written -> ms, or nil if it is none; second: whether the text makes sense
local function due_of(text)
  if text == '0' then
    return nil, true
  end
  local ms = tonumber(sub(text, 2))
  if not ms or not (ms > -1e15 and ms < 1e15) then
    return nil, false
  end
  if sub(text, 1, 1) == '+' then
    ms = now_ms + ms
  end
  return floor(ms), true
end

-- The frame with its time of entry. A sender who knows Redis' clock writes it into the header when he makes the frame; if
-- it lies within the last 100 ms, it stays: putting it in here makes two more strings of the frame's size.
local stamps = {}
local function stamped(f)
  local stamp = sub(f, 112, 127)
  local fresh = stamps[stamp]
  if fresh == nil then
    local us = not find(stamp, '%D') and tonumber(stamp)
    fresh = us and us <= now_number and us > now_number - 100000 or false
    stamps[stamp] = fresh
  end
  return fresh and f or enqueued_at(f, now_us)
end

-- Plans the frames argv[first..last]; `have` tells which are there already. Returns a reason if one is not acceptable.
local function plan(lane, bucket, due_text, value, first, last, ids, have)
  local due_ms, sense = due_of(due_text)
  if not sense then
    return 'due'
  end
  if due_ms then
    value = string.gsub(value, '^([^,]*,[^,]*,)[^,]*', '%1' .. string.format('%.0f', due_ms))
  end
  local waits = due_ms and due_ms > now_ms
  local frames, fields, jobs = lane_frames[lane], bucket_fields[bucket], 0
  if not frames then
    frames = {}
    lane_frames[lane], lane_jobs[lane] = frames, 0
  end
  if not fields then
    fields = {}
    bucket_fields[bucket], bucket_open[bucket] = fields, 0
  end
  local f_at, v_at = #frames, #fields
  local name = lane_name[lane]
  for j = first, last do
    local id = ids[j - first + 1]
    if not (have and have[j - first + 1]) then
      local f = argv[j]
      local n, _, total = frame(f)
      local frame_lane_name = n and lane_of(f)
      if n ~= total or not frame_lane_name then
        return 'frame'
      end
      if frame_lane_name ~= name then
        if name then
          return 'lane'
        end
        name = frame_lane_name
      end
      jobs = jobs + n
      if waits then
        late[#late + 1] = due_ms
        late[#late + 1] = stamped(f)
      else
        f_at = f_at + 1
        frames[f_at] = stamped(f)
      end
      if id then
        fields[v_at + 1], fields[v_at + 2] = id, value
        v_at = v_at + 2
      end
    end
  end
  lane_name[lane] = name
  created = created + jobs
  bucket_open[bucket] = bucket_open[bucket] + jobs
  if waits then
    late_jobs = late_jobs + jobs
    if due_ms > (bucket_due[bucket] or 0) then
      bucket_due[bucket] = due_ms
    end
  else
    lane_jobs[lane] = lane_jobs[lane] + jobs
  end
end

-- 'G' at i: returns the position behind it, or nil and a reason.
local function plan_group(i)
  local lane, bucket, m = int(argv[i + 1], lanes), int(argv[i + 2], buckets), int(argv[i + 5], size)
  if not lane or lane < 1 or not bucket or not m or m < 1 or i + 5 + m > size then
    return nil, 'group'
  end
  local first, ids, have = i + 6, {}, nil
  if bucket > 0 then
    for j = 1, m do
      ids[j] = sub(argv[first + j - 1], 5, 30)
    end
    have = values(bucket_key(bucket), ids)
  end
  reply[#reply + 1] = 1
  return first + m, plan(lane, bucket, argv[i + 3], argv[i + 4], first, first + m - 1, ids, have)
end

-- 'K' at i: the same.
local function plan_keyed(i)
  local lane, bucket = int(argv[i + 1], lanes), int(argv[i + 2], buckets)
  local key, ttl_s = int(argv[i + 5], #KEYS - 3 - 2 * lanes - buckets), int(argv[i + 7], 1e10)
  local mine, f = argv[i + 6], argv[i + 8]
  if not lane or lane < 1 or not bucket or not key or key < 1 or not ttl_s or ttl_s < 1 or not f then
    return nil, 'group'
  end
  local id = bucket > 0 and sub(f, 5, 30)
  reply[#reply + 1] = 1
  if id and redis.call('HEXISTS', bucket_key(bucket), id) == 1 then
    return i + 9
  end
  local held = key_held[key] or redis.call('GET', KEYS[3 + 2 * lanes + buckets + key])
  if held then
    if match(held, '^%S*') ~= match(mine, '^%S*') then
      reply[#reply] = held
      duplicates = duplicates + 1
    end
    return i + 9
  end
  -- A key outlives the wait of its job: otherwise a second job would be accepted while the first one still waits.
  local due_ms = due_of(argv[i + 3])
  local wait_s = due_ms and due_ms > now_ms and math.ceil((due_ms - now_ms) / 1000) or 0
  key_held[key] = mine
  key_sets[#key_sets + 1] = {KEYS[3 + 2 * lanes + buckets + key], mine, ttl_s + wait_s}
  return i + 9, plan(lane, bucket, argv[i + 3], argv[i + 4], i + 8, i + 8, {id}, nil)
end

local i = 4
while i <= size do
  local behind, bad
  if argv[i] == 'G' then
    behind, bad = plan_group(i)
  elseif argv[i] == 'K' then
    behind, bad = plan_keyed(i)
  else
    bad = 'group'
  end
  if bad then
    return redis.error_reply('BAD ' .. bad)
  end
  i = behind
end

if created > 0 then
  -- The first write. Redis checks memory here and nowhere later; versions word an error raised in a script differently,
  -- so we catch it and answer in our own word.
  local first = redis.pcall('HINCRBY', stats, 'submitted', created)
  if type(first) == 'table' and first.err then
    if find(first.err, 'OOM', 1, true) then
      return redis.error_reply('FULL Redis has reached maxmemory')
    end
    return redis.error_reply(match(first.err, '%-(%u+ .*)') or first.err)
  end
end
if duplicates > 0 then
  redis.pcall('HINCRBY', stats, 'duplicate', duplicates) -- at full memory a duplicate is answered all the same
end
for _, set in ipairs(key_sets) do
  redis.call('SET', set[1], set[2], 'EX', set[3])
end
for lane, frames in pairs(lane_frames) do
  if #frames > 0 then
    bulk('RPUSH', KEYS[2 + 2 * lane], frames)
    redis.call('HINCRBY', depth, lane_name[lane], lane_jobs[lane])
    wake(KEYS[3 + 2 * lane], #frames)
  end
end
if late_jobs > 0 then
  bulk('ZADD', delayed, late)
  redis.call('HINCRBY', depth, 'delayed', late_jobs)
end
for bucket, fields in pairs(bucket_fields) do
  if #fields > 0 then
    local key = bucket_key(bucket)
    bucket_grows(key, bucket_open[bucket], #fields / 2)
    bulk('HSET', key, fields)
    local due_ms = bucket_due[bucket] or now_ms
    bucket_keep(key, math.ceil((due_ms - now_ms) / 1000) + open_ttl_s)
  end
end
return reply
