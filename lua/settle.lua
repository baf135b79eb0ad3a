-- settle: end or change leases of one incarnation, each only if it still holds exactly that lease.
--
-- KEYS[1]    void        never exists
-- KEYS[2]    processing:<incarnation> hash, lease name -> frame
-- KEYS[3]    stats       hash
-- KEYS[4]    depth       hash
-- KEYS[5]    delayed     zset, frame -> due in ms
-- KEYS[6]    dlq         hash, job id -> frame of one
-- KEYS[7]    dlq_meta    hash, job id -> JSON
-- KEYS[8]    dlq_index   zset, job id -> ms
-- KEYS[9]    quarantine  list
-- KEYS[10]   closed      zset, bucket -> ms
-- KEYS[11]   waiting     zset, frame id -> ms
-- KEYS[12..] sorted:<lane>, wake:<lane> for each lane; then job:<bucket> for each bucket
-- ARGV[1]    lanes       int, number of pairs in KEYS
-- ARGV[2]    buckets     int
-- ARGV[3]    result_ttl_s int, life of a bucket after its last job has ended
-- ARGV[4]    open_ttl_s  int, its life after its latest due time before that
-- ARGV[5]    dlq_max     int, the oldest beyond it are dropped
-- ARGV[6]    channels    prefix of the channels of waiters
-- ARGV[7]    recovered   '1': count what this call ends, retries or returns as recovered
-- ARGV[8..]  lane name for each lane; then groups until the end, lane and bucket numbered from 1, bucket 0 is untracked:
--            'C', bucket, value, m, lease * m        whole frames, never cut, every job completed without a field of its
--                                                    own; value is the snapshot then ('' if untracked)
--            'R', bucket, value, m, (lease, json) * m        the same for frames of one job, each with its field
--            'P', lease, bucket, started_ms, finished_ms, ranges, (base, n, state)*, fields, (field, json)*,
--                 parts, (kind, arg, frame)*         one lease; ranges end as C, X or E; parts are
--                 'k' kept · 'r' returned · 't' failed attempt, back in arg ms · 'c' crash, back in arg ms ·
--                 'u' unknown type or arguments, back in arg ms · 'd' dead, arg is its JSON · 'q' damaged, all of it: the bytes
--                 that are held go to quarantine, whatever the frame here says
-- moves      running -> completed | cancelled | retrying | dead | queued | running | quarantine
-- returns    {now_us, marks}: for each lease in order '1' applied, '0' fenced (not held any more), 'b' bad (its parts do
--            not tile it, or a lane is missing in KEYS; not applied). Error BAD: the groups cannot be read, nothing done
-- cost       O(leases + parts), O(log of the set) for each part that goes to a sorted set
-- oom:       runs
--
-- Reading and checking of 'P' comes first, then lease after lease: HDEL, and only if it removed one, the rest. A name
-- that is in the hash was put there by fetch or by a part, so its shape is right.
--@include int
--@include frame
--@include bulk
--@include now
--@include wake
--@include snapshot
local argv, size, processing = ARGV, #ARGV, KEYS[2]
local lanes, buckets = int(ARGV[1], 1e3), int(ARGV[2], 1e4)
local result_ttl_s, open_ttl_s, dlq_max = int(ARGV[3], 1e10), int(ARGV[4], 1e10), int(ARGV[5], 1e15)
if not (lanes and buckets and result_ttl_s and result_ttl_s > 0 and open_ttl_s and dlq_max and
  size >= 7 + lanes and KEYS[11 + 2 * lanes + buckets]) then
  return redis.error_reply('BAD keys')
end
local _, now_number, now_ms = now()

local lane_number = {}
for lane = 1, lanes do
  lane_number[argv[7 + lane]] = lane
end
local function bucket_key(bucket)
  return KEYS[11 + 2 * lanes + bucket]
end

local marks = {}
local anyone_waits = redis.call('EXISTS', KEYS[11]) == 1
local ended = {}                -- then: ids of tracked frames of which something ended
local completed, cancelled, expired, failed, retried, dead, damaged, fenced, recovered = 0, 0, 0, 0, 0, 0, 0, 0, 0
local back, back_jobs = {}, {}  -- by lane: score, frame; jobs
local late, late_jobs = {}, 0   -- due, frame
local kept = {}                 -- lease, frame
local dlq, dlq_meta, dlq_index, quarantine = {}, {}, {}, {}
local bucket_fields, bucket_over, bucket_due = {}, {}, {} -- field, value; jobs that ended; latest due time
local bucket_ids, snapshots = {}, {} -- of the frames in 'P' groups

-- Checks ---------------------------------------------------------------------------------------------------------------

local lease_base, lease_n = {}, {}

-- base, n of a lease by name
local function lease_range(lease)
  local tail = sub(lease, 27)
  if lease_n[tail] == nil then
    local base, n = match(tail, '^%.(%d%d%d)%.(%d%d%d%d)%.%d%d%d%d%d$')
    lease_base[tail], lease_n[tail] = tonumber(base) or -1, tonumber(n) or false
  end
  return lease_base[tail], lease_n[tail]
end

local part_kinds = {k = true, r = true, t = true, c = true, u = true, d = true, q = true}
local end_states = {C = true, X = true, E = true}

-- Reads the part at p of a lease (frame id, base, n): base, n of the part, or nil if it is not acceptable.
local function part_range(p, id, base, n)
  local kind, arg, f = argv[p], argv[p + 1], argv[p + 2]
  if kind == 'q' then
    return base, n
  end
  local part_n, part_base = frame(f)
  if not part_n or sub(f, 5, 30) ~= id or not part_kinds[kind] then
    return nil
  end
  if kind == 'r' and not lane_number[lane_of(f)] then
    return nil
  end
  if kind == 'd' and part_n ~= 1 then
    return nil
  end
  if (kind == 't' or kind == 'c' or kind == 'u') then
    if not int(arg, 1e15) then
      return nil
    end
  end
  return part_base, part_n
end

-- 'P' at i -> {lease, bucket, started, finished, position of ranges, number, of fields, number, of parts, number, ok},
-- position behind it; or nil if the counts make no sense.
local function read_lease(i)
  local lease, bucket = argv[i + 1], int(argv[i + 2], buckets)
  local started, finished, ranges = int(argv[i + 3], 1e15), int(argv[i + 4], 1e15), int(argv[i + 5], 1000)
  if not (bucket and started and finished and ranges) then
    return nil
  end
  local ranges_at = i + 6
  local fields_at = ranges_at + 3 * ranges + 1
  local fields = int(argv[fields_at - 1], 1000)
  if not fields then
    return nil
  end
  local parts_at = fields_at + 2 * fields + 1
  local parts = int(argv[parts_at - 1], 1000)
  if not parts or parts_at + 3 * parts - 1 > size then
    return nil
  end
  local item = {lease, bucket, started, finished, ranges_at, ranges, fields_at, fields, parts_at, parts, false}
  local behind = parts_at + 3 * parts
  local base, n = lease_range(lease)
  if not n then
    return item, behind
  end
  -- The pieces must tile the lease: following them from its base to its end uses each once.
  local id, pieces, count = sub(lease, 1, 26), {}, ranges + parts
  for r = 0, ranges - 1 do
    local range_base, range_n = int(argv[ranges_at + 3 * r], 1000), int(argv[ranges_at + 3 * r + 1], 1000)
    if not range_base or not range_n or pieces[range_base] or not end_states[argv[ranges_at + 3 * r + 2]] then
      return item, behind
    end
    pieces[range_base] = range_n
  end
  for p = 0, parts - 1 do
    local part_base, part_n = part_range(parts_at + 3 * p, id, base, n)
    if not part_base or pieces[part_base] then
      return item, behind
    end
    pieces[part_base] = part_n
  end
  local at, used = base, 0
  while at < base + n do
    local size = pieces[at]
    if not size or size < 1 then
      return item, behind
    end
    at, used = at + size, used + 1
  end
  item[11] = at == base + n and used == count
  return item, behind
end

-- Writes ---------------------------------------------------------------------------------------------------------------

local function fields_of(bucket)
  local fields = bucket_fields[bucket]
  if not fields then
    fields = {}
    bucket_fields[bucket], bucket_over[bucket] = fields, 0
  end
  return fields
end

-- Tail of the name and n of a lease that holds a whole frame (of `total` jobs, if given), nil if it does not.
local function whole(lease, total)
  local base, n = lease_range(lease)
  if n and base == 0 and (not total or n == total) then
    return sub(lease, 27, 36), n
  end
end

-- 'C' at i (step 1) or 'R' (step 2). HDEL one by one: in bulk its count would not say which of the leases were held, and HMGET before it copies
-- the frames.
local function complete(i, step)
  local bucket, value, first, last = tonumber(argv[i + 1]), argv[i + 2], i + 4, i + 3 + step * argv[i + 3]
  local total, fields, size
  if bucket > 0 then
    total = tonumber(match(value, '^C,(%d+),')) or -1
    if step == 2 and total ~= 1 then
      total = -1
    end
    fields = fields_of(bucket)
    size = #fields
  end
  local tail, n, jobs, applied, odd = nil, nil, 0, 0, {}
  for j = first, last, step do
    local lease = argv[j]
    if not tail or not find(lease, tail, 27, true) then
      tail, n = whole(lease, total)
    end
    if not n then
      odd[j] = 'b'
    elseif call('HDEL', processing, lease) == 1 then
      jobs, applied = jobs + n, applied + 1
      if fields then
        local id = sub(lease, 1, 26)
        fields[size + 1], fields[size + 2] = id, value
        size = size + 2
        if step == 2 then
          fields[size + 1], fields[size + 2] = id .. '.0', argv[j + 1]
          size = size + 2
        end
        if anyone_waits then
          ended[#ended + 1] = id
        end
      end
    else
      odd[j] = '0'
      fenced = fenced + n
    end
  end
  if not next(odd) then
    marks[#marks + 1] = string.rep('1', applied)
  else
    for j = first, last, step do
      marks[#marks + 1] = odd[j] or '1'
    end
  end
  if fields then
    bucket_over[bucket] = bucket_over[bucket] + jobs
  end
  completed, recovered = completed + jobs, recovered + jobs
end

local function wait_until(due_ms, f, n, bucket, snapshot)
  late[#late + 1], late[#late + 2] = due_ms, f
  late_jobs = late_jobs + n
  if snapshot then
    if snapshot[2] == 1 then
      snapshot[3] = due_ms
    end
    if due_ms > (bucket_due[bucket] or 0) then
      bucket_due[bucket] = due_ms
    end
  end
end

local function bury(id, base, meta, f)
  local job = string.format('%s.%.0f', id, base)
  dlq[#dlq + 1], dlq[#dlq + 2] = job, f
  dlq_meta[#dlq_meta + 1], dlq_meta[#dlq_meta + 2] = job, meta
  dlq_index[#dlq_index + 1], dlq_index[#dlq_index + 2] = now_ms, job
end

local back_states = {t = 'R', c = 'R', u = 'R', d = 'D', q = 'B'}

-- Applies the part at p: how many of its jobs have ended.
local function settle_part(p, id, base, n, bucket, snapshot, bytes)
  local kind, arg, f = argv[p], argv[p + 1], argv[p + 2]
  if kind ~= 'q' then
    n, base = frame(f)
  end
  if snapshot then
    if back_states[kind] then
      snapshot_set(snapshot, base, n, back_states[kind])
    else
      snapshot_back(snapshot, base, n)
    end
  end
  if kind == 'k' then
    kept[#kept + 1], kept[#kept + 2] = lease_of(f), f
    return 0
  end
  recovered = recovered + n
  if kind == 'r' then
    local lane = lane_number[lane_of(f)]
    local list = back[lane] or {}
    list[#list + 1], list[#list + 2] = score_of(f), f
    back[lane], back_jobs[lane] = list, (back_jobs[lane] or 0) + n
    return 0
  elseif kind == 'q' then
    quarantine[#quarantine + 1] = bytes
    damaged = damaged + n
    return n
  end
  if kind == 't' or kind == 'd' then
    failed = failed + n
  end
  if kind == 'd' then
    dead = dead + n
    bury(id, base, arg, f)
    return n
  end
  retried = retried + n
  wait_until(floor(now_ms + tonumber(arg)), f, n, bucket, snapshot)
  return 0
end

-- 'P' as read
local function settle_lease(item)
  local lease, bucket = item[1], item[2]
  if not item[11] then
    marks[#marks + 1] = 'b'
    return
  end
  local base, n = lease_range(lease)
  local bytes = item[10] == 1 and argv[item[9]] == 'q' and call('HGET', processing, lease)
  if call('HDEL', processing, lease) ~= 1 then
    marks[#marks + 1] = '0'
    fenced = fenced + n
    return
  end
  marks[#marks + 1] = '1'
  local id, over = sub(lease, 1, 26), 0
  local snapshot = bucket > 0 and snapshots[bucket][id] or nil
  for r = item[5], item[5] + 3 * (item[6] - 1), 3 do
    local range_n, state = tonumber(argv[r + 1]), argv[r + 2]
    over = over + range_n
    if state == 'C' then
      completed = completed + range_n
    elseif state == 'X' then
      cancelled = cancelled + range_n
    else
      expired = expired + range_n
    end
    if snapshot then
      snapshot_set(snapshot, tonumber(argv[r]), range_n, state)
    end
  end
  recovered = recovered + over
  for p = item[9], item[9] + 3 * (item[10] - 1), 3 do
    over = over + settle_part(p, id, base, n, bucket, snapshot, bytes)
  end
  if anyone_waits and over > 0 and bucket > 0 then
    ended[#ended + 1] = id
  end
  if snapshot then
    local fields = fields_of(bucket)
    for field = item[7], item[7] + 2 * (item[8] - 1), 2 do
      fields[#fields + 1], fields[#fields + 2] = argv[field], argv[field + 1]
    end
    snapshot[4] = math.max(snapshot[4], item[3])
    snapshot[5] = math.max(snapshot[5], item[4])
    bucket_over[bucket] = bucket_over[bucket] + over
  end
end

-- Reads what stands in the buckets about the frames of the 'P' groups.
local function read_snapshots()
  for bucket, ids in pairs(bucket_ids) do
    local found = values(bucket_key(bucket), ids)
    for j = 1, #ids do
      local snapshot = snapshot_read(found[j])
      snapshots[bucket][ids[j]] = snapshot
      if snapshot then
        snapshot[7] = found[j]
      end
    end
  end
end

local function write_snapshots()
  for bucket, ids in pairs(bucket_ids) do
    local fields = bucket_fields[bucket]
    for j = 1, fields and #ids or 0 do
      local snapshot = snapshots[bucket][ids[j]]
      local value = snapshot and snapshot_write(snapshot)
      if value and value ~= snapshot[7] then
        fields[#fields + 1], fields[#fields + 2] = ids[j], value
      end
    end
  end
  for bucket, fields in pairs(bucket_fields) do
    if #fields > 0 then
      local key = bucket_key(bucket)
      bulk('HSET', key, fields)
      bucket_ended(key, bucket_over[bucket], bucket_due[bucket], KEYS[10], now_ms, result_ttl_s, open_ttl_s)
    end
  end
end

local function write_dlq()
  bulk('HSET', KEYS[6], dlq)
  bulk('HSET', KEYS[7], dlq_meta)
  bulk('ZADD', KEYS[8], dlq_index)
  local excess = redis.call('ZCARD', KEYS[8]) - dlq_max
  if excess <= 0 then
    return
  end
  local oldest = redis.call('ZPOPMIN', KEYS[8], math.min(excess, 1000))
  local jobs = {}
  for j = 1, #oldest, 2 do
    jobs[#jobs + 1] = oldest[j]
  end
  bulk('HDEL', KEYS[6], jobs)
  bulk('HDEL', KEYS[7], jobs)
  redis.call('HINCRBY', KEYS[3], 'dlq_dropped', #jobs)
end

-- One message for each frame that somebody waits for and of which something ended.
local function tell_waiters()
  local told = {}
  for first = 1, #ended, 2000 do
    local last = math.min(first + 1999, #ended)
    local until_ms = redis.call('ZMSCORE', KEYS[11], unpack(ended, first, last))
    for j = first, last do
      local id = ended[j]
      if until_ms[j - first + 1] and not told[id] then
        told[id] = true
        redis.call('PUBLISH', ARGV[6] .. id, '1')
      end
    end
  end
end

local function count(name, jobs)
  if jobs > 0 then
    redis.call('HINCRBY', KEYS[3], name, jobs)
  end
end

-- Reads all groups: a list of positions ('C') and items ('P'), or nil.
local function read_groups()
  local groups, i = {}, 8 + lanes
  while i <= size do
    if argv[i] == 'C' or argv[i] == 'R' then
      local bucket, m = int(argv[i + 1], buckets), int(argv[i + 3], size)
      local step = argv[i] == 'R' and 2 or 1
      if not bucket or not m or i + 3 + step * m > size then
        return nil
      end
      groups[#groups + 1] = i
      i = i + 4 + step * m
    elseif argv[i] == 'P' then
      local item, behind = read_lease(i)
      if not item then
        return nil
      end
      groups[#groups + 1] = item
      local bucket, id = item[2], sub(item[1], 1, 26)
      if bucket > 0 and item[11] then
        bucket_ids[bucket], snapshots[bucket] = bucket_ids[bucket] or {}, snapshots[bucket] or {}
        if snapshots[bucket][id] == nil then
          snapshots[bucket][id] = false
          bucket_ids[bucket][#bucket_ids[bucket] + 1] = id
        end
      end
      i = behind
    else
      return nil
    end
  end
  return groups
end

local groups = read_groups()
if not groups then
  return redis.error_reply('BAD groups')
end
read_snapshots()
redis.call('DEL', KEYS[1])
for _, group in ipairs(groups) do
  if type(group) == 'number' then
    complete(group, argv[group] == 'R' and 2 or 1)
  else
    settle_lease(group)
  end
end

bulk('HSET', processing, kept)
for lane, list in pairs(back) do
  bulk('ZADD', KEYS[10 + 2 * lane], list)
  redis.call('HINCRBY', KEYS[4], argv[7 + lane] .. ':sorted', back_jobs[lane])
  wake(KEYS[11 + 2 * lane], #list / 2)
end
if late_jobs > 0 then
  bulk('ZADD', KEYS[5], late)
  redis.call('HINCRBY', KEYS[4], 'delayed', late_jobs)
end
if dead > 0 then
  write_dlq()
end
bulk('RPUSH', KEYS[9], quarantine)
write_snapshots()
count('completed', completed)
count('cancelled', cancelled)
count('expired', expired)
count('failed', failed)
count('retried', retried)
count('dead', dead)
count('quarantined', damaged)
count('fenced', fenced)
if ARGV[7] == '1' then
  count('recovered', recovered)
end
tell_waiters()
return {now_number, table.concat(marks)}
