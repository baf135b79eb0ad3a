-- pause: let fetch pass over a lane; what runs goes on, delayed jobs still enter it.
--
-- KEYS[1]  void    never exists
-- KEYS[2]  paused  set of lanes
-- ARGV[1]  lane    str
-- moves    nothing
-- returns  1, or 0 if it was paused already
-- cost     O(1)
-- oom:     runs
redis.call('DEL', KEYS[1])
return redis.call('SADD', KEYS[2], ARGV[1])
