-- include/now: Redis time. As text it stays exact: `..` prints a number of 16 digits as 1.7e+15.

-- us as 16 digits, us as a number, ms as a number
local function now()
  local t = redis.call('TIME')
  local us = t[1] .. string.sub('00000' .. t[2], -6)
  local number = tonumber(us)
  return us, number, math.floor(number / 1000)
end
