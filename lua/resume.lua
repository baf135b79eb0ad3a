-- resume: let fetch look at a lane again.
--
-- KEYS[1]  void    never exists
-- KEYS[2]  paused  set of lanes
-- KEYS[3]  queue:<lane> list
-- KEYS[4]  sorted:<lane> zset
-- KEYS[5]  wake:<lane> list
-- ARGV[1]  lane    str
-- moves    nothing
-- returns  1, or 0 if it was not paused
-- cost     O(1)
-- oom:     runs
--
-- A paused lane has no tokens, so whoever waits would not learn of what lies in it: a token for each frame.
--@include wake
redis.call('DEL', KEYS[1])
local resumed = redis.call('SREM', KEYS[2], ARGV[1])
wake(KEYS[5], redis.call('LLEN', KEYS[3]) + redis.call('ZCARD', KEYS[4]))
return resumed
