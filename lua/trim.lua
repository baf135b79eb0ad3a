-- trim: forget closed buckets of snapshots, oldest first, before their time.
--
-- KEYS[1]   void    never exists
-- KEYS[2]   closed  zset, bucket -> ms when its last job ended
-- KEYS[3..] job:<bucket> for each bucket to drop
-- ARGV[1]   age_ms  int, a bucket that closed less than this ago stays: somebody may still read its results
-- moves     nothing
-- returns   number of fields dropped
-- cost      O(buckets); the memory is freed in the background
-- oom:      runs
--
-- A bucket may have been opened again (a replay, a slow producer) since the caller read `closed`: it is only taken off
-- the list. One that is gone already is taken off as well.
--@include now
local _, _, now_ms = now()
redis.call('DEL', KEYS[1])
local fields = 0
for i = 3, #KEYS do
  local open = redis.call('HGET', KEYS[i], 'open')
  local since = tonumber(redis.call('ZSCORE', KEYS[2], KEYS[i]))
  if not open or tonumber(open) > 0 then
    redis.call('ZREM', KEYS[2], KEYS[i])
  elseif since and since <= now_ms - tonumber(ARGV[1]) then
    fields = fields + redis.call('HLEN', KEYS[i])
    redis.call('UNLINK', KEYS[i])
    redis.call('ZREM', KEYS[2], KEYS[i])
  end
end
return fields
