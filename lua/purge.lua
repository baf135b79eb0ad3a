-- purge: drop dead jobs for good.
--
-- KEYS[1]   void        never exists
-- KEYS[2]   dlq         hash, job id -> frame of one
-- KEYS[3]   dlq_meta    hash, job id -> JSON
-- KEYS[4]   dlq_index   zset, job id -> ms
-- KEYS[5]   stats       hash
-- ARGV[1..] job id      of each
-- moves     dead -> nothing; its record stays `dead` until it expires
-- returns   how many there were
-- cost      O(jobs * log(dlq))
-- oom:      runs
--@include bulk
local jobs = {}
for i = 1, #ARGV do
  jobs[i] = ARGV[i]
end
redis.call('DEL', KEYS[1])
local before = redis.call('HLEN', KEYS[2])
bulk('HDEL', KEYS[2], jobs)
bulk('HDEL', KEYS[3], jobs)
bulk('ZREM', KEYS[4], jobs)
local purged = before - redis.call('HLEN', KEYS[2])
if purged > 0 then
  redis.call('HINCRBY', KEYS[5], 'purged', purged)
end
return purged
