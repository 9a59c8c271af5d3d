-- Carries out operations on contexts, each of them as one atomic step. The rules are those of resolve.py; which keys a
-- context has, and what is in them, is described in loglayout.py.
--
-- KEYS   For each operation the names of the context's state, history and commits; then its lease if the operation is a
--        lease or inside a turn.
-- ARGV   The four settings of the call, and then the operations. An operation is its shape, followed by its arguments.
--        The shape is the number of arguments (three bytes, big-endian), a letter for the kind and a letter for each
--        part; the arguments of the parts follow in that order.
-- Answer The server's time (16 digits) with one code letter for each operation. If a code has more to say, an array of
--        that text and an element for each such code.
--
-- Settings, in this order; times are in microseconds:
--   not_after  the server time after which a copy of this call is refused
--   ttl        0: contexts do not expire
--   earlier    the largest not_after of earlier copies of these operations whose outcome is unknown, or 0
--   confirm    1: the client waits for replicas, so a commit that was applied before has to write something again
--
-- Kinds: C commit; F commit inside a turn; D conversion; G conversion inside a turn; Q query; L lease.
--
-- Conditions of a commit, which come before its changes:
--   q  (none)         the id was given by the caller: it may have been used before
--   u  user           the caller is bound to this user
--   f  token          the commit belongs to the turn with this lease
--   n  (none)         the context must not exist
--   w  microseconds   the context must have been idle for so long
--   e  field, value   the field must have this value
--   g  field          the field must be absent
--   r  answer         what is answered if no change has an answer of its own
-- Changes of a commit; uppercase letters create an absent context:
--   A  count, messages            append
--   S  count, fields and values   set
--   Y  count, fields and values   replace all variables
--   Z  count, fields and values   replace all metadata
--   I  field, number              increment
--   J  field, 0 or 1, value, sum  increment from this value (1) or from none (0), added up by the client
--   C  (none)                     exist
--   O  user                       exist, owned by this user
--   T  user                       set the owner
--   R  user, start, created, updated, revision, expires: restore ('' for a value that is not given)
--   d  field                      drop a field
--   t  keep                       trim
--   p  n                          pop
--   x  (none)                     delete the context
--
-- Codes, with what else they say:
--   k            done                           a  answer                  done, with this answer
--   s  fields    a snapshot without messages    S  fields, first, messages, whole hash or ''
--   n            absent                         A                          done before; its answer was too large to keep
--   t, f         a lease is held, is not        o                          another owner
--   l            the turn lost its lease        x                          the context exists
--   i  id        the hash of another prefix     w  key, type               a key of another type
--   b            the history is damaged         h                          the hash is damaged
--   v  format    written by a newer version     y                          AgentUp's document over a context
--   L  ''        too late                       L  not_after               refused before: repeat after this time
--   d  text, ttl AgentUp's document             u  letters behind, value   not summed: the client has to
--   z            begin again                    e  text, E  text           an error before, after the first write
--
-- WINDOW, REMEMBERED, REMEMBER_CLEARED, LARGEST_KEPT and FORMAT are put in by script.py.

local call, attempt, keys, args = redis.call, redis.pcall, KEYS, ARGV
local byte, format, sub, max, min = string.byte, string.format, string.sub, math.max, math.min
local not_after, ttl, earlier, confirm = tonumber(args[1]), tonumber(args[2]), tonumber(args[3]), args[4] == '1'
local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
local now_text = format('%016.0f', now)
-- A call from the far future was stamped before the clock was set back: its commits would be forgotten too early.
local late = now > not_after or not_after > now + WINDOW

-- The operation at hand.
local state, history, commits, lease -- its keys
local shape, a -- its letters, and the index of its next argument
local repeated -- whether its commit id may be remembered already
local wrote -- whether it has changed anything
local place, k = 5, 1 -- where it begins in ARGV and KEYS
local codes, results = {}, { '' } -- the answer to those before it

-- A commit that only appends messages, or only sets fields, of a context where nothing is unusual, as nearly all are.
-- Returns nothing, and has changed nothing, if it is another one: then `commit` decides.
local function commit_plainly()
  local letters, count = sub(shape, 4), tonumber(args[a + 2])
  if (letters ~= 'CA' and letters ~= 'CS') or earlier > 0 or late then
    return
  end
  local stored = attempt('HMGET', state, 'id', 'format', 'updated', 'rev', 'start', 'end', 'exp', 'guard')
  local revision, first, last = tonumber(stored[4]), tonumber(stored[5]), tonumber(stored[6])
  if stored[1] ~= args[a] or stored[2] ~= FORMAT or not (revision and first and last) or count == 0 or count > 1000
    or (stored[3] or '~') >= now_text or (ttl == 0 and stored[7] ~= '') or (tonumber(stored[8]) or now) >= now
    or (revision + 1) % REMEMBERED == 0 or attempt('LLEN', history) ~= last - first then
    return
  end
  call('RPUSH', commits, args[a + 1])
  wrote = true
  if letters == 'CA' then
    call('RPUSH', history, unpack(args, a + 3, a + 2 + count))
    call('HSET', state, 'updated', now_text, 'rev', revision + 1, 'end', last + count)
  else -- S
    call('HSET', state, 'updated', now_text, 'rev', revision + 1, unpack(args, a + 3, a + 2 + 2 * count))
  end
  if ttl > 0 then
    local expire = math.floor((now + ttl + 999) / 1000)
    call('HSET', state, 'exp', format('%.0f', now + ttl))
    call('PEXPIREAT', state, expire)
    call('PEXPIREAT', history, expire)
    call('PEXPIREAT', commits, max(expire, math.floor(now / 1000) + REMEMBER_CLEARED))
  end
  return 'k'
end

-- Plain commits at the beginning come before the functions that they do not need are made. Making those takes a lone call
-- as long as its commands.
local fine, code
while place <= #args do
  shape, a = args[place], place + 1
  state, history, commits, wrote = keys[k], keys[k + 1], keys[k + 2], false
  fine, code = pcall(commit_plainly)
  if not (fine and code) then
    break
  end
  codes[#codes + 1] = code
  local high, middle, low = byte(shape, 1, 3)
  place, k = place + 1 + high * 65536 + middle * 256 + low, k + 3
end

if place <= #args then -- the rest of this file, for operations of other kinds

-- Adds the code of the operation at hand, and goes on to the next one. `fine`: whether it raised no error.
local function answer(fine, code, detail)
  if not fine then
    code, detail = wrote and 'E' or 'e', type(code) == 'table' and code.err or tostring(code)
  end
  codes[#codes + 1] = code
  if detail then
    results[#results + 1] = detail
  end
  local high, middle, low, kind = byte(shape, 1, 4)
  place = place + 1 + high * 65536 + middle * 256 + low
  k = k + ((kind == 67 or kind == 81 or kind == 68) and 3 or 4)
  return code
end

local function expire_at(time)
  local milliseconds = math.floor((time + 999) / 1000)
  call('PEXPIREAT', state, milliseconds)
  call('PEXPIREAT', history, milliseconds)
  call('PEXPIREAT', commits, max(milliseconds, math.floor(now / 1000) + REMEMBER_CLEARED))
end

-- Every call of the script makes its functions anew, which takes time. Those that most calls do not need are made when
-- the first of them is needed.
local made
local function rare()
  if made then
    return made
  end
  made = {}
  local find, match, floor = string.find, string.match, math.floor

  -- What follows the id of a commit in the list.
  function made.memory_of(answer)
    return '\n' .. now_text .. '\n' .. (#answer > LARGEST_KEPT and '!' or answer)
  end

  -- Sums

  -- An integer of up to 24 digits in two parts of one sign; nothing for anything else.
  local function parts_of(text)
    local sign, digits = match(text, '^(-?)(%d+)$')
    if not digits or #digits > 24 then
      return
    end
    local high, low = tonumber(sub(digits, 1, -13)) or 0, tonumber(sub(digits, -12))
    if sign == '-' then
      return -high, -low
    end
    return high, low
  end

  -- The sum of two integers, exactly (a double has only 15 digits); nothing if one is too large or no integer.
  function made.sum(one, other)
    local high, low = parts_of(one)
    local high_other, low_other = parts_of(other)
    if not high or not high_other then
      return
    end
    high, low = high + high_other, low + low_other
    if low >= 1e12 then
      high, low = high + 1, low - 1e12
    elseif low <= -1e12 then
      high, low = high - 1, low + 1e12
    end
    if high > 0 and low < 0 then
      high, low = high - 1, low + 1e12
    elseif high < 0 and low > 0 then
      high, low = high + 1, low - 1e12
    end
    if high == 0 then
      return format('%.0f', low + 0) -- "+ 0" makes 0 of -0
    end
    return format('%.0f%012.0f', high, math.abs(low))
  end

  function made.in_thousands(command, key, items)
    for first = 1, #items, 1000 do -- Lua's stack is small
      call(command, key, unpack(items, first, min(first + 999, #items)))
    end
  end

  -- The name that format 1 gave to a key. It may be outside of what the user of this connection may access.
  function made.former(name)
    if find(state, '{', 1, true) then -- the prefix has a hash tag
      return state .. '{' .. name .. '}'
    end
    return '{' .. state .. '}:' .. name
  end

  -- Renames what format 1 stored of a context. `state` has no format yet, or is absent.
  function made.carry_over()
    local old = made.former('history')
    if attempt('EXISTS', old) == 1 and call('TYPE', old).ok == 'list' then
      call('RENAME', old, history)
    end
    old = made.former('commits')
    if attempt('EXISTS', old) == 1 and call('TYPE', old).ok == 'list' then
      call('RENAME', old, commits)
    end
  end

  -- The answer about a context whose key `state` is no hash: AgentUp's document, or something that is not touched.
  function made.strange(problem)
    if sub(problem.err, 1, 9) ~= 'WRONGTYPE' then
      error(problem)
    end
    local kind = call('TYPE', state).ok
    if kind ~= 'string' then
      return 'w', { state, kind }
    end
    for _, name in ipairs({ history, made.former('history') }) do
      if attempt('EXISTS', name) == 1 then
        return 'y'
      end
    end
    for _, name in ipairs({ commits, made.former('commits') }) do
      local newest = attempt('LINDEX', name, -1)
      if type(newest) == 'string' and newest ~= '\r' then
        return 'y'
      end
    end
    return 'd', { call('GET', state), call('PTTL', state) }
  end

  -- Whether something is left of an absent context that was not cleared and has not expired: somebody else deleted its
  -- hash, or the server evicted it. `newest` is the last element of its commits.
  function made.has_remains(newest)
    return call('LLEN', history) > 0 or (newest and newest ~= '\r' and call('PTTL', commits) == -1)
  end

  -- Remembered commits

  -- Marks the context as cleared: the last element of its commits.
  function made.mark_cleared()
    call('RPUSH', commits, '\r')
    call('PEXPIRE', commits, REMEMBER_CLEARED)
  end

  function made.unmark_cleared()
    if call('LINDEX', commits, -1) == '\r' then
      call('RPOP', commits)
    end
  end

  -- The code of a commit whose id is remembered; nothing if the commit may be applied. Of a context that has expired no
  -- answer is told that may hold what was stored; of one that was cleared there are no such answers any more.
  function made.known(commit_id, exists)
    local place = call('LPOS', commits, commit_id, 'RANK', -1)
    if not place then
      return
    end
    local kind, value = match(call('LINDEX', commits, place + 1) or '', '^([\n\t])%d+[\n\t](.*)$')
    if kind == '\t' then
      if not_after <= tonumber(value) then
        return 'L', value
      end
      return
    end
    if confirm then
      call('LSET', commits, place, commit_id)
    end
    if not value or value == '' then
      return 'k'
    elseif value == '!' then
      return 'A'
    elseif not exists and value ~= 'true' and value ~= 'false' and call('LINDEX', commits, -1) ~= '\r' then
      return 'A'
    end
    return 'a', value
  end

  -- Removes the answers that may hold what was stored in a context that was cleared or has expired.
  function made.forget_answers()
    for i, element in ipairs(call('LRANGE', commits, 0, -1)) do
      local time, value = match(element, '^\n(%d+)\n(.*)$')
      if value and value ~= '' and value ~= 'true' and value ~= 'false' and value ~= '!' then
        call('LSET', commits, i - 1, '\n' .. time .. '\n!')
      end
    end
  end

  -- The code of a commit that changes nothing, unless it was applied before. `refused`: even then.
  function made.unchanged(exists, commit_id, code, detail, refused)
    if repeated then
      local before, answer = made.known(commit_id, exists)
      if before and refused then
        return code, detail
      elseif before then
        return before, answer
      end
    end
    if earlier > 0 then
      -- The copy that was sent earlier may still arrive, and would contradict this answer.
      made.unmark_cleared()
      call('RPUSH', commits, commit_id, format('\t%s\t%016.0f', now_text, earlier))
      if not exists then
        made.mark_cleared()
      elseif (tonumber(call('HGET', state, 'guard')) or 0) < earlier then
        call('HSET', state, 'guard', format('%.0f', earlier))
      end
    end
    return code, detail
  end

  -- Forgets the commits that are neither among the last ones nor could still arrive a second time.
  function made.forget(length)
    local spare = length - 2 * REMEMBERED -- each id has at most one element that belongs to it
    while spare > 0 do
      local oldest, old = call('LRANGE', commits, 0, min(spare, 2 * REMEMBERED) - 1), 0
      for i = 1, #oldest do
        local time = (byte(oldest[i]) or 0) < 32 and tonumber(match(oldest[i], '^[\n\t](%d+)') or '')
        if time and time >= now - WINDOW then
          break -- and so are those behind it
        elseif time then
          old = i
        end
      end
      if old == 0 then
        return
      end
      call('LTRIM', commits, old, -1)
      spare = spare - old
    end
  end

  -- Drops all fields of a space ('v' variables, 'm' metadata). `blank`: what is stored does not count.
  function made.drop_all(pending, letter, blank)
    for _, field in ipairs(blank and {} or call('HKEYS', state)) do
      if byte(field) == letter and byte(field, 2) == 58 then
        pending[field] = false
      end
    end
    for field in pairs(pending) do
      if byte(field) == letter then
        pending[field] = false
      end
    end
  end

  return made
end

-- Commits

local function commit()
  local id, commit_id = args[a], args[a + 1]
  a = a + 2
  local stored = attempt('HMGET', state, 'id', 'format', 'user', 'updated', 'rev', 'start', 'end', 'exp', 'guard')
  if stored.err then
    return rare().strange(stored)
  end
  local exists = stored[1] and true or false
  if exists and stored[1] ~= id then
    return 'i', stored[1]
  elseif not exists and call('EXISTS', state) == 1 then
    return 'w', { state, 'hash' } -- somebody else's: ours has an id
  elseif stored[2] and stored[2] ~= FORMAT then
    return 'v', stored[2]
  elseif late then
    return 'L', ''
  elseif not stored[2] then
    rare().carry_over()
  end

  local user, updated, revision, first, last, expires, guard = '', 0, 0, 0, 0, '', 0 -- as stored
  if exists then
    user, updated, revision, expires = stored[3], tonumber(stored[4]), tonumber(stored[5]), stored[8]
    first, last, guard = tonumber(stored[6]), tonumber(stored[7]), tonumber(stored[9]) or 0
    if not (user and updated and revision and first and last and expires) then
      return 'h'
    end
  end
  local length = attempt('LLEN', history)
  if type(length) ~= 'number' then
    if sub(length.err, 1, 9) == 'WRONGTYPE' then
      return 'w', { history, call('TYPE', history).ok }
    end
    error(length)
  end
  repeated = not exists or earlier > 0 or now <= guard
  local newest = not exists and call('LINDEX', commits, -1) -- of a context that was here before, if there was one
  local remains = not exists and rare().has_remains(newest)

  -- What the changes so far lead to.
  local present, created, deletes, touched, answer = exists, false, false, false, ''
  local owner, bound = user, ''
  local start, keep, fresh = first, last, {} -- of the stored messages [start, keep) stay, and these are appended
  local pending, blank = {}, not exists -- fields that are set (false: dropped); whether no others are left
  local restored -- where the times of a restored context stand among the arguments

  for j = 5, #shape do
    local part = byte(shape, j)
    if part < 97 then -- uppercase
      if not present then
        present, owner, created, touched = true, bound, true, true
      elseif part ~= 67 and part ~= 79 then -- C and O may change nothing
        touched = true
      end
    end
    if part == 65 then -- A
      local count = tonumber(args[a])
      for i = a + 1, a + count do
        fresh[#fresh + 1] = args[i]
      end
      a = a + 1 + count
    elseif part == 83 or part == 89 or part == 90 then -- S, Y, Z
      if part ~= 83 then
        rare().drop_all(pending, part == 89 and 118 or 109, blank)
      end
      local count = tonumber(args[a])
      for i = a + 1, a + 2 * count, 2 do
        pending[args[i]] = args[i + 1]
      end
      a = a + 1 + 2 * count
    elseif part == 73 or part == 74 or part == 100 then -- I, J, d
      local field = args[a]
      local current = pending[field]
      if current == nil then
        current = not blank and call('HGET', state, field)
      end
      if part == 100 then
        touched = touched or present
        answer = current and 'true' or 'false'
        if current then
          pending[field] = false
        end
        a = a + 1
      else
        local total
        if part == 73 then
          total = rare().sum(current or '0', args[a + 1])
          a = a + 2
        else
          total = current == (args[a + 1] == '1' and args[a + 2]) and args[a + 3]
          a = a + 4
        end
        if not total then
          return rare().unchanged(exists, commit_id, 'u', { #shape - j, current })
        end
        pending[field], answer = total, total
      end
    elseif part == 116 then -- t
      touched = touched or present
      start = max(start, keep + #fresh - tonumber(args[a]))
      if start > keep then
        local rest = {}
        for i = start - keep + 1, #fresh do
          rest[#rest + 1] = fresh[i]
        end
        fresh, keep = rest, start
      end
      a = a + 1
    elseif part == 112 then -- p
      touched = touched or present
      local count = min(tonumber(args[a]), keep + #fresh - start)
      local from_stored, popped = max(0, count - #fresh), {}
      if from_stored > 0 then
        if length ~= last - first then
          return 'b'
        end
        popped = call('LRANGE', history, keep - from_stored - first, keep - 1 - first)
        keep = keep - from_stored
      end
      local stays = #fresh - (count - from_stored)
      for i = stays + 1, #fresh do
        popped[#popped + 1] = fresh[i]
      end
      for i = #fresh, stays + 1, -1 do
        fresh[i] = nil
      end
      answer = '[' .. table.concat(popped, ',') .. ']'
      a = a + 1
    elseif part == 120 then -- x
      touched = touched or present or remains
      answer = (present or remains) and 'true' or 'false'
      deletes, present, created, restored = true, false, false, nil
      owner, revision, start, keep, fresh = '', 0, 0, 0, {}
      pending, blank = {}, true
    elseif part == 79 then -- O
      if owner ~= args[a] then
        if owner ~= '' then
          return rare().unchanged(exists, commit_id, 'o')
        end
        owner, touched = args[a], true
      end
      a = a + 1
    elseif part == 84 then -- T
      if bound == '' or (exists and not deletes) then -- else a bound user makes the context, and owns it
        owner = args[a]
      end
      a = a + 1
    elseif part == 82 then -- R
      owner = args[a]
      if not exists then
        start = tonumber(args[a + 1])
        keep = start
      end
      restored = a + 2
      a = a + 6
    elseif part == 117 then -- u
      bound = args[a]
      if exists and user ~= bound then
        return rare().unchanged(exists, commit_id, 'o', nil, true)
      end
      a = a + 1
    elseif part == 102 then -- f
      if call('GET', lease) ~= args[a] then
        return rare().unchanged(exists, commit_id, 'l')
      end
      a = a + 1
    elseif part == 110 then -- n
      if exists then
        return rare().unchanged(exists, commit_id, 'x')
      end
    elseif part == 119 then -- w
      if not exists or min(updated, now) > now - tonumber(args[a]) then
        return rare().unchanged(exists, commit_id, 'a', 'false')
      end
      a = a + 1
    elseif part == 101 then -- e
      if (exists and call('HGET', state, args[a])) ~= args[a + 1] then
        return rare().unchanged(exists, commit_id, 'a', '?')
      end
      a = a + 2
    elseif part == 103 then -- g
      if exists and call('HEXISTS', state, args[a]) == 1 then
        return rare().unchanged(exists, commit_id, 'a', '?')
      end
      a = a + 1
    elseif part == 114 then -- r
      answer = args[a]
      a = a + 1
    elseif part == 113 then -- q
      repeated = true
    end
  end
  if remains and not deletes then
    return 'b'
  elseif not touched then
    local code, detail = 'k', nil
    if answer ~= '' then
      code, detail = 'a', answer
    end
    if repeated then
      return rare().unchanged(exists, commit_id, code, detail)
    end
    return code, detail
  end

  -- The last checks. What can fail comes before the first write, or is the first write.
  local renewed = not exists or deletes -- nothing stays of what is stored
  if not renewed and length ~= last - first then
    return 'b'
  end
  if exists and deletes then
    call('LLEN', commits) -- is it a list?
  end
  if repeated then
    local code, detail = rare().known(commit_id, exists)
    if code then
      return code, detail
    end
  end
  if created then
    guard = (exists or newest) and now + WINDOW or 0 -- a copy of an earlier commit may be on its way
  end

  -- The commits, and what is deleted
  if newest == '\r' then
    call('RPOP', commits)
  end
  if deletes then
    call('UNLINK', state, history) -- first: it needs no memory, and a script that has written is not refused any more
    wrote = true
  end
  if (exists and deletes) or (newest and newest ~= '\r') then
    rare().forget_answers()
  end
  revision = revision + 1
  local remembered
  if answer ~= '' or revision % REMEMBERED == 0 then -- now and then one with its time, for `forget`
    remembered = call('RPUSH', commits, commit_id, rare().memory_of(answer))
  else
    remembered = call('RPUSH', commits, commit_id)
  end
  wrote = true
  if revision % REMEMBERED == 0 or not present then
    rare().forget(remembered)
  end
  if not present then
    rare().mark_cleared()
    return 'a', answer
  end

  -- The history
  if length > 0 and not renewed then
    if start >= min(keep, last) then
      call('UNLINK', history)
    elseif start > first or keep < last then
      call('LTRIM', history, start - first, keep - first - 1)
    end
  end
  if #fresh == 1 then
    call('RPUSH', history, fresh[1])
  elseif #fresh > 0 then
    rare().in_thousands('RPUSH', history, fresh)
  end

  -- The hash
  local time = now_text
  if updated >= now then -- it never goes backwards
    time = format('%016.0f', updated + 1)
  end
  local expire = ttl > 0 and now + ttl
  local birth = now_text
  if restored then
    if args[restored + 1] ~= '' then time = args[restored + 1] end
    if args[restored + 3] ~= '' then expire = tonumber(args[restored + 3]) end
    if not exists and args[restored] ~= '' then birth = args[restored] end
    if not exists and args[restored + 2] ~= '' then revision = tonumber(args[restored + 2]) end
  end
  if created then
    pending.id, pending.created = id, birth
  end
  if created or not stored[2] then
    pending.format = FORMAT
  end
  if created or start ~= first then
    pending.start = start
  end
  if created or owner ~= user then
    pending.user = owner
  end
  if created or earlier > guard then
    pending.guard = format('%.0f', max(guard, earlier))
  end
  if expire then
    pending.exp = format('%.0f', expire)
  elseif created or expires ~= '' then
    pending.exp = ''
  end
  local set, size, gone = { 'updated', time, 'rev', revision, 'end', keep + #fresh }, 6, {}
  for field, value in pairs(pending) do
    if value then
      set[size + 1], set[size + 2] = field, value
      size = size + 2
    elseif not renewed then
      gone[#gone + 1] = field
    end
  end
  if size <= 1000 then
    call('HSET', state, unpack(set))
  else
    rare().in_thousands('HSET', state, set)
  end
  if gone[1] then
    rare().in_thousands('HDEL', state, gone)
  end
  if expire then
    expire_at(expire)
  elseif expires ~= '' or newest then
    call('PERSIST', state)
    call('PERSIST', history)
    call('PERSIST', commits)
  end
  if answer == '' then
    return 'k'
  end
  return 'a', answer
end

-- Reads. Parts: u bound to a user; h a window of the history (first, before, limit, each may be ''); then either g, all
-- fields of the hash, or F, a count and names of fields.
local function query()
  local id, bound, window, named = args[a], nil, nil, {}
  a = a + 1
  for j = 5, #shape do
    local part = byte(shape, j)
    if part == 117 then
      bound = args[a]
      a = a + 1
    elseif part == 104 then
      window = a
      a = a + 3
    elseif part == 70 then
      named = { unpack(args, a + 1, a + tonumber(args[a])) }
    else
      named = nil
    end
  end
  local stored = attempt('HMGET', state, 'id', 'format', 'user', 'created', 'updated', 'rev', 'start', 'end', 'exp',
    unpack(named or {}))
  if stored.err then
    return rare().strange(stored)
  elseif not stored[1] then
    if call('EXISTS', state) == 1 then
      return 'w', { state, 'hash' }
    end
    return rare().has_remains(call('LINDEX', commits, -1)) and 'b' or 'n'
  elseif stored[1] ~= id then
    return 'i', stored[1]
  elseif stored[2] and stored[2] ~= FORMAT then
    return 'v', stored[2]
  elseif bound and stored[3] ~= bound then
    return 'o'
  elseif not window and named then
    return 's', stored
  end
  local start, stop = tonumber(stored[7]), tonumber(stored[8])
  if not (start and stop) then
    return 'h'
  end
  local position, messages = stop, {}
  if window then
    local source = history
    if not stored[2] and attempt('EXISTS', rare().former('history')) == 1 then
      source = rare().former('history')
    end
    local from, before, limit = tonumber(args[window]), tonumber(args[window + 1]), tonumber(args[window + 2])
    local last = before and max(start, min(before, stop)) or stop
    position = from and max(start, min(from, last)) or start
    if limit and from then
      last = min(last, position + limit)
    elseif limit then
      position = max(position, last - limit)
    end
    if call('LLEN', source) ~= stop - start then
      return 'b'
    end
    if position < last then
      messages = call('LRANGE', source, position - start, last - start - 1)
    end
  end
  return 'S', { stored, format('%.0f', position), messages, named and '' or call('HGETALL', state) }
end

-- Replaces AgentUp's document by what a commit makes of it, which the client has resolved. Arguments: context id, commit
-- id, document, answer, [token,] count, fields and values, count, messages, count, ids and answers of earlier commits.
local function convert()
  local commit_id, document, answer = args[a + 1], args[a + 2], args[a + 3]
  a = a + 4
  if late then
    return 'L', ''
  end
  if byte(shape, 5) == 102 then -- f
    if call('GET', lease) ~= args[a] then
      return rare().unchanged(false, commit_id, 'l')
    end
    a = a + 1
  end
  if call('TYPE', state).ok ~= 'string' or call('GET', state) ~= document then
    return 'z' -- not that document any more
  end
  rare().carry_over()
  local code, detail = rare().known(commit_id, true)
  if code then
    return code, detail
  end
  local function counted()
    local items, count = {}, tonumber(args[a])
    for i = a + 1, a + count do
      items[#items + 1] = args[i]
    end
    a = a + 1 + count
    return items
  end
  local fields, messages, earlier_commits = counted(), counted(), counted()
  local remaining = call('PTTL', state)
  local ids = {}
  for i = 1, #earlier_commits, 2 do
    ids[#ids + 1], ids[#ids + 2] = earlier_commits[i], rare().memory_of(earlier_commits[i + 1])
  end
  ids[#ids + 1], ids[#ids + 2] = commit_id, rare().memory_of(answer)
  rare().unmark_cleared()
  rare().in_thousands('RPUSH', commits, ids)
  wrote = true
  call('UNLINK', state)
  if #fields == 0 then -- the commit deletes it
    rare().mark_cleared()
  else
    local expires = (ttl > 0 and now + ttl) or (remaining > 0 and now + remaining * 1000)
    for _, item in ipairs({ 'format', FORMAT, 'exp', expires and format('%.0f', expires) or '',
      'guard', format('%.0f', now + WINDOW) }) do
      fields[#fields + 1] = item
    end
    rare().in_thousands('HSET', state, fields)
    rare().in_thousands('RPUSH', history, messages)
    if expires then
      expire_at(expires)
    else
      call('PERSIST', commits)
    end
  end
  if answer == '' then
    return 'k'
  end
  return 'a', answer
end

-- Takes (t), renews (r) or releases (l) the lease of a turn. Arguments: context id, token, milliseconds[, user (u)].
local function turn()
  local id, token, milliseconds = args[a], args[a + 1], args[a + 2]
  if late then
    return 'L', ''
  end
  if byte(shape, 6) == 117 then -- u
    local stored = attempt('HMGET', state, 'id', 'user')
    if stored.err then
      return rare().strange(stored)
    elseif stored[1] and stored[1] ~= id then
      return 'i', stored[1]
    elseif stored[1] and stored[2] ~= args[a + 3] then
      return 'o'
    end
  end
  local action, holder = byte(shape, 5), call('GET', lease)
  if not holder and action == 116 then
    holder = attempt('GET', rare().former('lease')) -- a process of the version before
    holder = type(holder) == 'string' and holder
  end
  if holder ~= token and (holder or action ~= 116) then
    return 'f'
  elseif action == 108 then
    call('DEL', lease)
  else
    call('SET', lease, token, 'PX', milliseconds)
  end
  return 't'
end

if wrote and not fine then
  answer(fine, code)
end
local unfinished = {} -- contexts with an operation that will be sent again: those behind it have to wait
while place <= #args do
  shape, a = args[place], place + 1
  local kind = byte(shape, 4)
  state, history, commits, lease = keys[k], keys[k + 1], keys[k + 2], keys[k + 3]
  repeated, wrote = true, false
  local detail
  fine, code = true, 'z'
  if not unfinished[state] then
    if kind == 67 or kind == 70 then -- C, F
      fine, code = pcall(commit_plainly)
      if fine and not code then
        fine, code, detail = pcall(commit)
      end
    elseif kind == 81 then -- Q
      fine, code, detail = pcall(query)
    elseif kind == 76 then -- L
      fine, code, detail = pcall(turn)
    else -- D, G
      fine, code, detail = pcall(convert)
    end
  end
  if string.find('deLuz', answer(fine, code, detail), 1, true) then
    unfinished[state] = true
  end
end

end
results[1] = now_text .. table.concat(codes)
return results[2] and results or results[1]
