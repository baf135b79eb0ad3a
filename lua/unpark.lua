-- unpark: give frames that this version understands back to their lanes.
--
-- KEYS[1]   void        never exists
-- KEYS[2]   parked      list
-- KEYS[3]   depth       hash
-- KEYS[4..] sorted:<lane>, wake:<lane> for each lane
-- ARGV[1]   frames_max  int, how many to look at
-- ARGV[2..] lane        name for each lane
-- moves     parked -> queued
-- returns   {frames moved, frames left}
-- cost      O(frames_max * log(sorted))
-- oom:      runs
--
-- What is still not understood, or has a lane that KEYS lacks, goes to the tail, so that each call looks at others.
--@include frame
--@include bulk
--@include wake
local lane_number, back, jobs = {}, {}, {}
for lane = 1, #ARGV - 1 do
  lane_number[ARGV[lane + 1]] = lane
  back[lane], jobs[lane] = {}, 0
end
redis.call('DEL', KEYS[1])
local frames_max = math.min(tonumber(ARGV[1]), redis.call('LLEN', KEYS[2]))
local stay, moved, looked = {}, 0, 0
while looked < frames_max do
  local popped = redis.call('LPOP', KEYS[2], math.min(64, frames_max - looked))
  for j = 1, #popped do
    local f = popped[j]
    local n = frame(f)
    local lane = n and lane_number[lane_of(f)]
    if lane then
      local list = back[lane]
      list[#list + 1], list[#list + 2] = score_of(f), f
      jobs[lane], moved = jobs[lane] + n, moved + 1
    else
      stay[#stay + 1] = f
    end
  end
  looked = looked + #popped
end
bulk('RPUSH', KEYS[2], stay)
for lane, list in ipairs(back) do
  if #list > 0 then
    bulk('ZADD', KEYS[2 + 2 * lane], list)
    redis.call('HINCRBY', KEYS[3], ARGV[1 + lane] .. ':sorted', jobs[lane])
    wake(KEYS[3 + 2 * lane], #list / 2)
  end
end
return {moved, redis.call('LLEN', KEYS[2])}
