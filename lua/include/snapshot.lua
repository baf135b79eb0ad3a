-- include/snapshot: buckets of status snapshots and the fields in them. Layout: docs/WIRE_FORMAT.md section 3.
-- Wants include/bulk before it.

-- Prolongs a bucket's life to at least `want_s` from now. Without it a bucket that expired and was written again would
-- never expire.
local function bucket_keep(bucket, want_s)
  if redis.call('TTL', bucket) < want_s then
    redis.call('EXPIRE', bucket, want_s)
  end
end

-- Counts `jobs` in `frames` new fields as open. Redis keeps a hash of up to 512 short fields as one packed list, in which
-- it searches each field from the start: 2.5 us a field. One long value turns it into a table; small buckets stay packed.
local bucket_pad = string.rep('-', 65)
local function bucket_grows(bucket, jobs, frames)
  local open = redis.call('HINCRBY', bucket, 'open', jobs)
  if frames >= 32 or frames == jobs and open >= 64 and open - jobs < 64 then
    redis.call('HSET', bucket, 'pad', bucket_pad)
  end
end

-- `jobs` of the bucket have ended (nil: none), and until `due_ms` one of it waits (nil: none). What is closed lives
-- for result_ttl_s from the last end; what is open as long as the latest due time, plus open_ttl_s.
local function bucket_ended(bucket, jobs, due_ms, closed, now_ms, result_ttl_s, open_ttl_s)
  if jobs and jobs > 0 and redis.call('HINCRBY', bucket, 'open', -jobs) <= 0 then
    redis.call('EXPIRE', bucket, result_ttl_s)
    redis.call('ZADD', closed, now_ms, bucket)
  elseif due_ms then
    bucket_keep(bucket, math.ceil((due_ms - now_ms) / 1000) + open_ttl_s)
  elseif redis.call('TTL', bucket) == -1 then
    redis.call('EXPIRE', bucket, open_ttl_s)
  end
end

-- value -> {states, total, due, started, finished, rest} | nil if there is none or it is damaged
local function snapshot_read(value)
  if not value then
    return nil
  end
  local states, total, due, started, finished, rest =
    string.match(value, '^(%u+),(%d+),(%d+),(%d+),(%d+),(.*)$')
  total = tonumber(total)
  if not total or total < 1 or total > 1000 or (#states ~= 1 and #states ~= total) then
    return nil
  end
  return {states, total, tonumber(due), tonumber(started), tonumber(finished), rest}
end

local function snapshot_write(snapshot)
  local states, total = snapshot[1], snapshot[2]
  local one = string.sub(states, 1, 1)
  if total > 1 and #states > 1 and states == string.rep(one, total) then
    states = one
  end
  return string.format('%s,%.0f,%.0f,%.0f,%.0f,%s', states, total, snapshot[3], snapshot[4], snapshot[5], snapshot[6])
end

-- State of one job, nil beyond the frame.
local function snapshot_state(snapshot, index)
  if index < 0 or index >= snapshot[2] then
    return nil
  end
  local states = snapshot[1]
  return #states == 1 and states or string.sub(states, index + 1, index + 1)
end

-- Sets the states of n jobs from base.
local function snapshot_set(snapshot, base, n, state)
  local states, total = snapshot[1], snapshot[2]
  if n == total then
    snapshot[1] = state
    return
  end
  if base + n > total then
    return
  end
  if #states == 1 then
    states = string.rep(states, total)
  end
  snapshot[1] = string.sub(states, 1, base) .. string.rep(state, n) .. string.sub(states, base + n + 1)
end

-- n jobs from base are back in a lane: those that were retrying are queued again.
local function snapshot_back(snapshot, base, n)
  local states = snapshot[1]
  if not string.find(states, 'R', 1, true) then
    return
  end
  if #states == 1 then
    states = string.rep(states, snapshot[2])
  end
  local part = string.gsub(string.sub(states, base + 1, base + n), 'R', 'Q')
  snapshot[1] = string.sub(states, 1, base) .. part .. string.sub(states, base + n + 1)
end
