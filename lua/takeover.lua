-- takeover: give all leases of one incarnation to a new one; start, resync, recovery and (guarded) reaping are this.
--
-- KEYS[1]  void          never exists
-- KEYS[2]  incarnations  zset, incarnation -> end of its lease in ms
-- KEYS[3]  processing:<old> hash, lease name -> frame
-- KEYS[4]  processing:<new> hash
-- ARGV[1]  old           str, '' at the start of a worker
-- ARGV[2]  new           str, never used before
-- ARGV[3]  lease_ms      int
-- ARGV[4]  guard         '' or, to reap, the lease end of old in ms that the reaper has seen
-- moves    running -> running, of another incarnation
-- returns  {now_us, lease_end_ms, lease, frame, ...}; the same again when the same pair comes again. Error BOTH: both
--          hashes exist, nothing was done. Error LIVE: the guard does not hold, nothing was done
-- cost     O(leases held), which fetch bounds
-- oom:     runs
--
-- Whatever is still on the wire under the old name finds neither lease nor hash afterwards: that is the fence.
--@include now
local old, new, guard = ARGV[1], ARGV[2], ARGV[4]
local _, now_number, now_ms = now()
if guard ~= '' then
  local seen = redis.call('ZSCORE', KEYS[2], old)
  if seen then
    if tonumber(seen) ~= tonumber(guard) or tonumber(seen) >= now_ms then
      return redis.error_reply('LIVE incarnation ' .. old .. ' has a lease until ' .. seen)
    end
  elseif not redis.call('ZSCORE', KEYS[2], new) then
    return redis.error_reply('LIVE incarnation ' .. old .. ' is gone')
  end
end
local move = old ~= '' and redis.call('EXISTS', KEYS[3]) == 1
if move and redis.call('EXISTS', KEYS[4]) == 1 then
  return redis.error_reply('BOTH incarnations ' .. old .. ' and ' .. new .. ' hold leases')
end

redis.call('DEL', KEYS[1])
if old ~= '' then
  redis.call('ZREM', KEYS[2], old)
end
if move then
  redis.call('RENAME', KEYS[3], KEYS[4])
end
local lease_end_ms = now_ms + tonumber(ARGV[3])
redis.call('ZADD', KEYS[2], lease_end_ms, new)
local reply = redis.call('HGETALL', KEYS[4])
table.insert(reply, 1, lease_end_ms)
table.insert(reply, 1, now_number)
return reply
