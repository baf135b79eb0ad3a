-- replay: put dead jobs back into their lanes, each once.
--
-- KEYS[1]   void        never exists
-- KEYS[2]   dlq         hash, job id -> frame of one
-- KEYS[3]   dlq_meta    hash, job id -> JSON
-- KEYS[4]   dlq_index   zset, job id -> ms
-- KEYS[5]   stats       hash
-- KEYS[6]   depth       hash
-- KEYS[7]   closed      zset, bucket -> ms
-- KEYS[8..] queue:<lane>, wake:<lane> for each lane; then job:<bucket> for each bucket
-- ARGV[1]   lanes       int, number of pairs in KEYS
-- ARGV[2]   buckets     int
-- ARGV[3]   open_ttl_s  int
-- ARGV[4..] job id, lane, bucket (0: untracked), frame of one for each job; lane and bucket numbered from 1. The frame
--           is the dead one with its counters at 0 and run + 1
-- moves     dead -> queued
-- returns   {now_us, marks}: for each job '1' replayed, '0' not in the queue (any more), 'b' not a frame of that job.
--           Error BAD: the arguments cannot be read, nothing was done
-- cost      O(jobs * log(dlq))
-- oom:      runs
--@include int
--@include frame
--@include bulk
--@include now
--@include wake
--@include snapshot
local lanes, buckets, open_ttl_s = int(ARGV[1], 1e3), int(ARGV[2], 1e4), int(ARGV[3], 1e10)
local now_us, now_number, now_ms = now()
if not (lanes and buckets and open_ttl_s and KEYS[7 + 2 * lanes + buckets]) or (#ARGV - 3) % 4 ~= 0 then
  return redis.error_reply('BAD arguments')
end

-- Lane and bucket of the group at i if its frame is what it says.
local function group_at(i)
  local lane, bucket, f = int(ARGV[i + 1], lanes), int(ARGV[i + 2], buckets), ARGV[i + 3]
  local n, base = frame(f)
  if n ~= 1 or string.format('%s.%.0f', sub(f, 5, 30), base) ~= ARGV[i] or not lane_of(f) then
    return nil
  end
  if not lane or lane < 1 or not bucket then
    return nil
  end
  return lane, bucket, base
end

local lane_frames, lane_name, marks = {}, {}, {}

local function reopen(key, id, base)
  local snapshot = snapshot_read(redis.call('HGET', key, id))
  if not snapshot then
    return -- its record has expired: the job runs, but nothing is known of it
  end
  snapshot_set(snapshot, base, 1, 'Q')
  if snapshot[2] == 1 then
    snapshot[3] = 0
  end
  redis.call('HSET', key, id, snapshot_write(snapshot))
  redis.call('HINCRBY', key, 'open', 1)
  redis.call('ZREM', KEYS[7], key)
  bucket_keep(key, open_ttl_s)
end

redis.call('DEL', KEYS[1])
local replayed = 0
for i = 4, #ARGV, 4 do
  local job, f = ARGV[i], ARGV[i + 3]
  local lane, bucket, base = group_at(i)
  local mark = 'b'
  if lane then
    mark = '0'
    if redis.call('HDEL', KEYS[2], job) == 1 then
      mark, replayed = '1', replayed + 1
      redis.call('HDEL', KEYS[3], job)
      redis.call('ZREM', KEYS[4], job)
      local frames = lane_frames[lane] or {}
      frames[#frames + 1] = enqueued_at(f, now_us)
      lane_frames[lane], lane_name[lane] = frames, lane_of(f)
      if bucket > 0 then
        reopen(KEYS[7 + 2 * lanes + bucket], sub(f, 5, 30), base)
      end
    end
  end
  marks[#marks + 1] = mark
end
for lane, frames in pairs(lane_frames) do
  bulk('RPUSH', KEYS[6 + 2 * lane], frames)
  redis.call('HINCRBY', KEYS[6], lane_name[lane], #frames)
  wake(KEYS[7 + 2 * lane], #frames)
end
if replayed > 0 then
  redis.call('HINCRBY', KEYS[5], 'replayed', replayed)
end
return {now_number, table.concat(marks)}
