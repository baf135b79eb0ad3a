-- leave: end an incarnation that holds no lease.
--
-- KEYS[1]  void          never exists
-- KEYS[2]  incarnations  zset, incarnation -> end of its lease in ms
-- KEYS[3]  processing:<incarnation> hash
-- ARGV[1]  incarnation   str
-- moves    nothing
-- returns  1 it is gone, 0 it still holds leases and stays
-- cost     O(1)
-- oom:     runs
redis.call('DEL', KEYS[1])
if redis.call('EXISTS', KEYS[3]) == 1 then
  return 0
end
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
