-- advance: note up to which slot schedules have been submitted; never backwards.
--
-- KEYS[1]    void  never exists
-- KEYS[2]    cron  hash
-- ARGV[1..]  name, slot in ms, job id for each schedule; an empty id leaves the one that is noted
-- moves      nothing
-- returns    how many went forward
-- cost       O(schedules)
-- oom:       runs
--
-- A steward that was stopped for a while must not undo what others have noted, nor revive a schedule that is gone.
--@include int
redis.call('DEL', KEYS[1])
local moved = 0
for i = 1, #ARGV - 2, 3 do
  local name, slot, job = ARGV[i], int(ARGV[i + 1], 1e15), ARGV[i + 2]
  if slot and redis.call('HEXISTS', KEYS[2], 'schedule:' .. name) == 1 then
    local noted = redis.call('HGET', KEYS[2], 'last:' .. name) or ''
    local at = int(string.match(noted, '^%d+'), 1e15)
    if not at or at < slot then
      job = job ~= '' and job or string.match(noted, '^%d+ (.*)$') or ''
      redis.call('HSET', KEYS[2], 'last:' .. name, string.format('%.0f %s', slot, job))
      moved = moved + 1
    end
  end
end
return moved
