-- include/wake: tokens on which idle workers block. A script that adds to a lane pushes one for each frame, as far as
-- sixteen fit: nobody registers as idle, so nothing can come between a registration and an empty fetch, and tokens
-- that nobody wants do not pile up.
local wake_tokens = {'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w', 'w'}

local function wake(key, frames)
  local missing = 16 - redis.call('LLEN', key)
  if frames < missing then
    missing = frames
  end
  if missing > 0 then
    redis.call('RPUSH', key, unpack(wake_tokens, 1, missing))
  end
end
