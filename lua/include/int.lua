-- include/int: a whole number from an argument, nil if it is none or lies outside of 0 to max. tonumber alone takes nan,
-- hex and fractions, and one of them in a key's number or a count would raise after the first write.
local function int(text, max)
  local number = tonumber(text)
  if number and number >= 0 and number <= max and number % 1 == 0 then
    return number
  end
end
