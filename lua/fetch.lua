-- fetch: lease frames of some lanes to one incarnation, within three budgets.
--
-- KEYS[1]    void        never exists
-- KEYS[2]    incarnations zset, incarnation -> end of its lease in ms
-- KEYS[3]    processing:<incarnation> hash, lease name -> frame
-- KEYS[4]    depth       hash
-- KEYS[5]    stats       hash
-- KEYS[6]    cancel      hash, frame id -> indexes
-- KEYS[7]    quarantine  list
-- KEYS[8]    parked      list
-- KEYS[9]    paused      set of lanes
-- KEYS[10..] queue:<lane>, sorted:<lane>, wake:<lane> for each lane, highest rank first
-- ARGV[1]    incarnation str
-- ARGV[2]    lease_ms    int, the lease is extended to this far from now
-- ARGV[3]    jobs_max    int
-- ARGV[4]    bytes_max   int
-- ARGV[5]    frames_max  int
-- ARGV[6]    window_jobs int, budget instead of jobs_max for the list of a lane that is ordered
-- ARGV[7]    sorted_max  int, frames in the sorted part of a lane from which on its list waits for its turn
-- ARGV[8..]  lane, T_us for each lane: 0 is plain FIFO, else the bound by which a score may lie before `enqueued`
-- moves      queued -> running
-- returns    {now_us, lease_end_ms, number of leases held now, cancels, left, frame...}; cancels is flat: position of a
--            frame (from 1), indexes of it that somebody wants cancelled; left too: number of a lane with T of which
--            something was taken (from 1), lowest key left in it. Error LEASE: the incarnation is not registered
-- cost       O(frames), O(log of the sorted set) for each frame that came back or was scored
-- oom:       runs
--
-- A list's head may be as urgent as `enqueued - T` (the lowest score that it could get), so that is its key when it
-- meets the sorted part; the sorted part wins ties. What the list of an ordered lane brings is to be scored and mostly
-- given back, so it has a budget of its own; who runs what is scored needs to know the lowest key that is left: nothing
-- above it may run before. A first frame is always taken. What exceeds the budget goes back to
-- where it was. What is no frame goes to quarantine before anything else touches it.
-- A list that is entered in bulk would so be scored to its end before its first job runs, a frame of one for each job.
-- So from `sorted_max` on its head counts as `enqueued`, a boost of 0, which keeps the bound as any boost up to T does.
--@include frame
--@include bulk
--@include now
local lease_end = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not lease_end then
  return redis.error_reply('LEASE incarnation ' .. ARGV[1] .. ' is not registered')
end
local _, now_number, now_ms = now()
local jobs_left, bytes_left, frames_left = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

redis.call('DEL', KEYS[1])
local lanes = (#KEYS - 9) / 3
local out, out_size = {now_number, now_ms + tonumber(ARGV[2]), 0, {}, {}}, 5
local window_left, left = tonumber(ARGV[6]), {}
local held, held_size = {}, 0
local damaged, newer = {}, {}
local full, frames_first = false, frames_left
local any_paused = redis.call('EXISTS', KEYS[9]) == 1
local no_tokens, no_depth = {}, {}

redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[2]), ARGV[1])

-- How many frames to pop next: what the budgets leave of frames like those so far, but never more than four times the
-- last chunk, since the first frames may be nothing like the rest.
local function chunk_of(last)
  local size = last * 4
  local taken = frames_first - frames_left
  if taken > 0 then
    local jobs = math.ceil(jobs_left * taken / (tonumber(ARGV[3]) - jobs_left + 1))
    local bytes = math.ceil(bytes_left * taken / (tonumber(ARGV[4]) - bytes_left + 1))
    size = math.min(size, jobs, bytes)
  end
  return math.max(1, math.min(size, frames_left))
end

-- Takes popped frames list[at], list[at + step], … up to list[last]: position of the first that it did not take, jobs
-- taken, and whether one exceeded a budget.
local function take(list, at, last, step)
  local jobs = 0
  while at <= last do
    local f = list[at]
    local n, verdict = frame(f)
    if n then
      local bytes = #f
      if (n > jobs_left or bytes > bytes_left) and out_size > 5 then
        return at, jobs, true
      end
      jobs_left, bytes_left = jobs_left - n, bytes_left - bytes
      jobs, out_size = jobs + n, out_size + 1
      out[out_size] = f
      held[held_size + 1], held[held_size + 2] = lease_of(f), f
      held_size = held_size + 2
    else
      local aside = verdict == 'newer' and newer or damaged
      aside[#aside + 1] = f
    end
    frames_left = frames_left - 1
    at = at + step
  end
  return at, jobs, false
end

-- The lowest key of a lane: its list's head f and its lowest score are given if they are known.
local function lowest_key(queue, sorted, bound_us, f, score)
  f = f or redis.call('LINDEX', queue, 0)
  score = tonumber(score or redis.call('ZRANGE', sorted, 0, 0, 'WITHSCORES')[2])
  local key = f and enqueued_of(f) - bound_us
  return score and key and math.min(score, key) or score or key or nil
end

-- Leases from one lane until it is empty (true) or the budget is full.
local function drain(queue, sorted, name, bound_us)
  local ordered = bound_us > 0
  bound_us = ordered and redis.call('ZCARD', sorted) < tonumber(ARGV[7]) and bound_us or 0
  local list, list_at, list_more, list_chunk, list_jobs = {}, 1, true, 0.25, 0
  local set, set_at, set_more, set_chunk, set_jobs = {}, 1, true, 0.25, 0
  while true do
    if frames_left <= 0 or jobs_left <= 0 or bytes_left <= 0 then
      full = true
      break
    end
    if set_more and not set[set_at] then
      set_chunk = chunk_of(set_chunk)
      set, set_at = redis.call('ZPOPMIN', sorted, set_chunk), 1
      set_more = #set == set_chunk * 2
    end
    if list_more and not list[list_at] then
      list_chunk = chunk_of(list_chunk)
      list, list_at = redis.call('LPOP', queue, list_chunk) or {}, 1
      list_more = #list == list_chunk
    end
    local f, scored = list[list_at], set[set_at]
    if not f and not scored then
      break
    end
    local jobs
    if scored and (not f or tonumber(set[set_at + 1]) <= enqueued_of(f) - bound_us) then
      set_at, jobs, full = take(set, set_at, f and set_at or #set - 1, 2)
      set_jobs = set_jobs + jobs
    else
      local jobs_kept = jobs_left
      if ordered then
        jobs_left = window_left
      end
      list_at, jobs, full = take(list, list_at, scored and list_at or #list, 1)
      if ordered then
        window_left, jobs_left = jobs_left, jobs_kept
      end
      list_jobs = list_jobs + jobs
    end
    if full then
      break
    end
  end
  local back = {}
  for j = #list, list_at, -1 do
    back[#back + 1] = list[j]
  end
  bulk('LPUSH', queue, back)
  back = {}
  for j = set_at, #set, 2 do
    back[#back + 1], back[#back + 2] = set[j + 1], set[j]
  end
  bulk('ZADD', sorted, back)
  if ordered and list_jobs + set_jobs > 0 then
    left[name] = lowest_key(queue, sorted, bound_us, list[list_at], set[set_at + 1])
  end
  if not list[list_at] and not set[set_at] then
    if not (list_more or set_more) or redis.call('EXISTS', queue, sorted) == 0 then
      return true
    end
  end
  if list_jobs > 0 then
    redis.call('HINCRBY', KEYS[4], name, -list_jobs)
  end
  if set_jobs > 0 then
    redis.call('HINCRBY', KEYS[4], name .. ':sorted', -set_jobs)
  end
  return false
end

-- On exit every lane is treated alike, looked at or not: empty, its tokens go, which loses nothing since it is empty in
-- this very script; not empty, it has a token, so that whoever waits comes; paused, it has none.
for lane = 1, lanes do
  local queue, sorted, wake = KEYS[7 + 3 * lane], KEYS[8 + 3 * lane], KEYS[9 + 3 * lane]
  local name = ARGV[6 + 2 * lane]
  if any_paused and redis.call('SISMEMBER', KEYS[9], name) == 1 then
    no_tokens[#no_tokens + 1] = wake
  else
    local empty
    if full then
      empty = redis.call('EXISTS', queue, sorted) == 0
    else
      empty = drain(queue, sorted, name, tonumber(ARGV[7 + 2 * lane]) or 0)
      out[5][#out[5] + 1], out[5][#out[5] + 2] = left[name] and lane, left[name]
    end
    if empty then
      no_tokens[#no_tokens + 1] = wake
      no_depth[#no_depth + 1], no_depth[#no_depth + 2] = name, name .. ':sorted'
    elseif redis.call('EXISTS', wake) == 0 then
      redis.call('RPUSH', wake, 'w')
    end
  end
end
if #no_tokens > 0 then
  redis.call('DEL', unpack(no_tokens))
end
if #no_depth > 0 then
  redis.call('HDEL', KEYS[4], unpack(no_depth))
end

-- Two frames with one name: the second would overwrite the first in the hash. Rare, so it is looked for only when the
-- hash grew by less than it should; of each name the first one is leased, the others are damaged.
local function keep_first()
  local seen, kept, kept_held = {}, {out[1], out[2], out[3], out[4], out[5]}, {}
  for j = 1, held_size, 2 do
    local lease, f = held[j], held[j + 1]
    if seen[lease] then
      damaged[#damaged + 1] = f
    else
      seen[lease] = true
      kept[#kept + 1] = f
      kept_held[#kept_held + 1], kept_held[#kept_held + 2] = lease, f
    end
  end
  out, out_size, held, held_size = kept, #kept, kept_held, #kept_held
  bulk('HSET', KEYS[3], held)
end

if held_size > 0 then
  local before = redis.call('HLEN', KEYS[3])
  bulk('HSET', KEYS[3], held)
  out[3] = redis.call('HLEN', KEYS[3])
  if out[3] - before < held_size / 2 then
    keep_first()
  end
  if redis.call('EXISTS', KEYS[6]) == 1 then
    local ids = {}
    for j = 6, out_size do
      ids[j - 5] = sub(out[j], 5, 30)
    end
    local wanted, cancels = values(KEYS[6], ids), out[4]
    for j = 1, #ids do
      if wanted[j] then
        cancels[#cancels + 1], cancels[#cancels + 2] = j, wanted[j]
      end
    end
  end
else
  out[3] = redis.call('HLEN', KEYS[3])
end
if #damaged > 0 then
  bulk('RPUSH', KEYS[7], damaged)
  redis.call('HINCRBY', KEYS[5], 'quarantined', #damaged)
end
if #newer > 0 then
  bulk('RPUSH', KEYS[8], newer)
  redis.call('HINCRBY', KEYS[5], 'parked', #newer)
end
return out
