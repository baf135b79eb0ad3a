-- cancel: ask for a job to be cancelled; at once if it is a delayed frame of one, else by whoever fetches or runs it.
--
-- KEYS[1]  void          never exists
-- KEYS[2]  cancel        hash, frame id -> indexes, separated by commas
-- KEYS[3]  delayed       zset, frame -> due in ms
-- KEYS[4]  stats         hash
-- KEYS[5]  depth         hash
-- KEYS[6]  closed        zset, bucket -> ms
-- KEYS[7]  job:<bucket>  hash
-- KEYS[8]  waiting       zset, frame id -> ms
-- ARGV[1]  frame id      str
-- ARGV[2]  index         int
-- ARGV[3]  result_ttl_s  int
-- ARGV[4]  done          str, what the channels of those who wait begin with
-- moves    scheduled | retrying -> cancelled; else nothing, it is a request
-- returns  'cancelled' | 'requested' | 'too_late:<state>' | 'unknown' (untracked, or its record has expired)
-- cost     O(log(delayed) + 64)
-- oom:     runs
--
-- `cancelled` is an end like any other and only one script may write it: here when the frame was still in our hands,
-- else settle. So a job cannot end twice.
--@include frame
--@include bulk
--@include now
--@include snapshot
local id, index = ARGV[1], tonumber(ARGV[2])
local bucket = KEYS[7]
local snapshot = snapshot_read(redis.call('HGET', bucket, id))
local state = snapshot and index and snapshot_state(snapshot, index)
if not state then
  return 'unknown'
elseif state ~= 'Q' and state ~= 'R' then
  return 'too_late:' .. state
end

redis.call('DEL', KEYS[1])
local due_ms = snapshot[3]
if snapshot[2] == 1 and due_ms > 0 then
  local due = string.format('%.0f', due_ms)
  local members = redis.call('ZRANGEBYSCORE', KEYS[3], due, due, 'LIMIT', 0, 64)
  for j = 1, #members do
    local f = members[j]
    if sub(f, 5, 30) == id and frame(f) then
      local _, _, now_ms = now()
      redis.call('ZREM', KEYS[3], f)
      snapshot[1], snapshot[5] = 'X', now_ms
      redis.call('HSET', bucket, id, snapshot_write(snapshot))
      bucket_ended(bucket, 1, nil, KEYS[6], now_ms, tonumber(ARGV[3]), 0)
      redis.call('HINCRBY', KEYS[4], 'cancelled', 1)
      if redis.call('EXISTS', KEYS[3]) == 0 then
        redis.call('HDEL', KEYS[5], 'delayed')
      else
        redis.call('HINCRBY', KEYS[5], 'delayed', -1)
      end
      if redis.call('ZSCORE', KEYS[8], id) then
        redis.call('PUBLISH', ARGV[4] .. id, '1')
      end
      return 'cancelled'
    end
  end
end
local wanted = redis.call('HGET', KEYS[2], id)
local number = string.format('%.0f', index)
if not wanted then
  redis.call('HSET', KEYS[2], id, number)
elseif not find(',' .. wanted .. ',', ',' .. number .. ',', 1, true) then
  redis.call('HSET', KEYS[2], id, wanted .. ',' .. number)
end
return 'requested'
