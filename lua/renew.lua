-- renew: extend the leases of the incarnations that a steward answers for.
--
-- KEYS[1]   void          never exists
-- KEYS[2]   incarnations  zset, incarnation -> end of its lease in ms
-- KEYS[3]   cancel        hash
-- KEYS[4..] processing:<incarnation> of each
-- ARGV[1]   lease_ms      int
-- ARGV[2..] incarnation   of each, in the same order
-- moves     running -> running
-- returns   {now_us, 1 if somebody wants a job cancelled else 0, lease_end_ms, then of each: 1 alive or 0 gone, number
--           of leases held}
-- cost      O(incarnations)
-- oom:      runs
--
-- Never revives: an incarnation that was taken over stays gone. One that has ended and was not reaped yet is extended.
--@include now
local _, now_number, now_ms = now()
local lease_end_ms = now_ms + tonumber(ARGV[1])
redis.call('DEL', KEYS[1])
local reply = {now_number, redis.call('EXISTS', KEYS[3]), lease_end_ms}
for i = 4, #KEYS do
  local incarnation = ARGV[i - 2]
  if redis.call('ZSCORE', KEYS[2], incarnation) then
    redis.call('ZADD', KEYS[2], lease_end_ms, incarnation)
    reply[#reply + 1] = 1
  else
    reply[#reply + 1] = 0
  end
  reply[#reply + 1] = redis.call('HLEN', KEYS[i])
end
return reply
