-- Carries out operations on contexts, each of them as one atomic step. The rules are those of resolve.py.
--
-- KEYS: of every operation the hash (state), the list of messages (history) and the list of remembered commits; then the
-- lease of those that need it.
-- ARGV: settings of the call, and then the operations. Of each operation first its shape: three bytes that count its
-- arguments (big-endian), a letter for its kind, and a letter for each of its parts, whose arguments follow in that
-- order. Values, messages and names are opaque. The settings are "not_after", or "not_after ttl earlier confirm":
--   not_after  microseconds of this server's clock; a copy of the call that arrives later is refused
--   ttl        microseconds, or 0
--   earlier    the largest not_after of earlier copies of these operations, whose fate is unknown; or 0
--   confirm    1: replicas will be waited for, so even a commit that was applied before has to write something
-- Answers this server's time (16 digits) with a code letter for each operation; where codes have more to say, an array
-- of it and an element for each of them.
--
-- Remembered commits are a list, oldest first, of their ids. What belongs to one follows it: '\n', its time, '\n', its
-- answer; or '\t', its time, '\t', and the not_after of a copy that was on its way when the commit was refused. A last
-- element '\r' says that the context was cleared. Looking an id up means going through the list, so it is done only for
-- a commit that may be there: one whose id the caller gave, one that was sent before, and any commit of a context for
-- which such a copy may still be on its way. Until when that may be is the hash's field "guard".
--
-- WINDOW, REMEMBERED, REMEMBER_CLEARED and LARGEST_KEPT are put in by the client. Functions are made anew by each call of
-- the script, and every variable that one catches costs a fifth of a command. So what most calls ask comes first, without
-- any function; the others are made when they are needed, and are given what they need as a table, `at`.

local call, attempt, keys, args = redis.call, redis.pcall, KEYS, ARGV
local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
local now_text = clock[1] .. string.sub('00000' .. clock[2], -6)
local not_after, ttl, earlier, confirm = tonumber(args[1]), 0, 0, false
if not not_after then
  not_after, ttl, earlier, confirm = string.match(args[1], '^(%d+) (%d+) (%d+) (%d)$')
  not_after, ttl, earlier, confirm = tonumber(not_after), tonumber(ttl), tonumber(earlier), confirm == '1'
end
-- A call from the far future was stamped before the clock was set back: its commits would be forgotten too early.
local late = now > not_after or not_after > now + WINDOW
local codes, results, m = {}, { '' }, 1
local a, k, i, last = 2, 1, 0, #args
local usual = not late and earlier == 0
local unfinished -- contexts with an operation that will be sent again: those behind it have to wait
local at -- what is needed for any operation; made below when it is needed
repeat
while a <= last do
  local shape = args[a]
  local high, middle, low, kind = string.byte(shape, 1, 4)
  local code, detail
  if unfinished and unfinished[keys[k]] then
    code = 'z'
  elseif usual and (shape == '\0\0\3CA' or (kind == 67 and #shape < 200 and string.find(shape, '^[AS]+$', 5))) then
    -- The most frequent commits: messages for a context that exists, and keys set. Here and below: where anything is
    -- unusual it leaves no trace, and the general case decides.
    local state, stored = keys[k], attempt('HMGET', keys[k], 'id', 'updated', 'rev', 'start', 'end', 'exp', 'guard')
    local revision, start, stop = tonumber(stored[3]), tonumber(stored[4]), tonumber(stored[5])
    if stored[1] == args[a + 1] and revision and start and stop and (stored[2] or '~') < now_text and (stored[7] or '~') < now_text
      and (revision + 1) % REMEMBERED ~= 0 and (ttl > 0 or stored[6] == '')
      and type(attempt('RPUSH', keys[k + 2], args[a + 2])) == 'number' then
      local parts, n, length = #shape, 0, nil
      if parts == 5 then
        if shape == '\0\0\3CA' then
          n, length = 1, attempt('RPUSH', keys[k + 1], args[a + 3])
        end
      else
        local fresh, j = {}, a + 3
        for part = 5, parts do
          if string.byte(shape, part) == 65 then
            n = n + 1
            fresh[n] = args[j]
            j = j + 1
          else
            j = j + 2
          end
        end
        if n > 0 then
          length = attempt('RPUSH', keys[k + 1], unpack(fresh))
        end
      end
      if n > 0 and length ~= stop - start + n then
        call('RPOP', keys[k + 2])
        if type(length) == 'number' then
          call('RPOP', keys[k + 1], n)
        end
      else
        code = 'k'
        if parts == 5 and ttl == 0 then
          if n == 1 then
            call('HSET', state, 'updated', now_text, 'rev', revision + 1, 'end', stop + 1)
          else
            call('HSET', state, 'updated', now_text, 'rev', revision + 1, args[a + 3], args[a + 4])
          end
        else
          local set, size, j = { 'updated', now_text, 'rev', revision + 1, 'end', stop + n }, 6, a + 3
          for part = 5, parts do
            if string.byte(shape, part) == 65 then
              j = j + 1
            else
              set[size + 1], set[size + 2] = args[j], args[j + 1]
              size, j = size + 2, j + 2
            end
          end
          if ttl > 0 then
            set[size + 1], set[size + 2] = 'exp', string.format('%.0f', now + ttl)
          end
          call('HSET', state, unpack(set))
          if ttl > 0 then
            local expire = math.floor((now + ttl + 999) / 1000)
            call('PEXPIREAT', state, expire)
            call('PEXPIREAT', keys[k + 1], expire)
            call('PEXPIREAT', keys[k + 2], math.max(expire, math.floor(now / 1000) + REMEMBER_CLEARED))
          end
        end
      end
    end
  end
  if not code and usual and ttl == 0 and (shape == '\0\0\4CI' or shape == '\0\0\3Cd' or shape == '\0\0\7CerS'
      or shape == '\0\0\2CC') then
    -- A number added to a variable; a key dropped; a key set if a variable has a value; nothing, for a context that exists.
    local state, field, part = keys[k], args[a + 3], string.byte(shape, 5)
    local stored = attempt('HMGET', state, 'id', 'updated', 'rev', 'exp', 'guard', part ~= 67 and field or 'id')
    local revision, value, answer, changed = tonumber(stored[3]), stored[6], nil, nil
    if part == 73 then
      local before, by = value or '0', args[a + 4]
      if #before < 15 and #by < 15 and string.find(before, '^-?%d+$') and string.find(by, '^-?%d+$') then
        answer = string.format('%.0f', before + by)
        changed = answer
      end
    elseif part == 100 then
      answer = value and 'true' or 'false'
    elseif part == 101 then
      answer = value == args[a + 4] and #args[a + 5] <= LARGEST_KEPT and args[a + 5]
      field, changed = args[a + 6], args[a + 7]
    end
    if stored[1] == args[a + 1] and revision and stored[4] == '' and (stored[2] or '~') < now_text
      and (stored[5] or '~') < now_text and (revision + 1) % REMEMBERED ~= 0 then
      if part == 67 then
        code = 'k'
      elseif answer and type(attempt('RPUSH', keys[k + 2], args[a + 2], '\n' .. now_text .. '\n' .. answer)) == 'number' then
        code, detail = 'a', answer
        if changed then
          call('HSET', state, 'updated', now_text, 'rev', revision + 1, field, changed)
        else
          call('HSET', state, 'updated', now_text, 'rev', revision + 1)
          if value then
            call('HDEL', state, field)
          end
        end
      end
    end
  end
  if not code then
    if not at then
      break
    end
    local fine
    at.wrote, at.repeated = false, true
    if kind == 67 or kind == 70 then -- C, F: a commit; F needs the lease
      fine, code, detail = pcall(at.commit, at, shape, a + 1, k)
    elseif kind == 81 then -- Q
      fine, code, detail = pcall(at.query, at, shape, a + 1, k)
    else -- L: a lease; D, G: a conversion, G needs the lease
      fine, code, detail = pcall(at:seldom()[kind == 76 and 'lease' or 'convert'], shape, a + 1, k)
    end
    if not fine then
      detail = type(code) == 'table' and code.err or tostring(code)
      code = at.wrote and 'E' or 'e'
      if code == 'e' and (kind == 67 or kind == 70) then
        code, detail = at:seldom().refused(keys[k + 2], args[a + 2], detail)
      end
    end
    if string.find('deLuz', code, 1, true) then
      unfinished = unfinished or {}
      unfinished[keys[k]] = true
    end
  end
  i = i + 1
  codes[i] = code
  if detail then
    m = m + 1
    results[m] = detail
  end
  a = a + 1 + high * 65536 + middle * 256 + low
  k = k + ((kind == 67 or kind == 81 or kind == 68) and 3 or 4)
end
if a <= last then -- What is not of the most frequent kinds.
at = { now = now, now_text = now_text, not_after = not_after, ttl = ttl, earlier = earlier, confirm = confirm, late = late }

-- What most commits do without.
function at.seldom(at)
  if at.made then
    return at.made
  end
  local make = {}
  at.made = make
  local call, attempt, keys, args = redis.call, redis.pcall, KEYS, ARGV
  local byte, find, format, match, sub = string.byte, string.find, string.format, string.match, string.sub
  local floor, concat = math.floor, table.concat
  local now, now_text, not_after, ttl, earlier = at.now, at.now_text, at.not_after, at.ttl, at.earlier

  function make.each_thousand(command, key, items)
    local last
    for first = 1, #items, 1000 do
      last = call(command, key, unpack(items, first, math.min(first + 999, #items)))
    end
    return last
  end

  -- Of another type than ours under the key of a context: AgentUp's document, or something that is not touched.
  function make.strange(problem, k)
    if sub(problem.err, 1, 9) ~= 'WRONGTYPE' then
      error(problem)
    end
    local state, history, commits = keys[k], keys[k + 1], keys[k + 2]
    local kind = call('TYPE', state).ok
    if kind ~= 'string' then
      return 'w', { state, kind }
    end
    if call('EXISTS', history) == 1 or (call('LINDEX', commits, -1) or '\r') ~= '\r' then
      return 'y'
    end
    return 'd', { call('GET', state), call('PTTL', state) }
  end

  -- Says that the context was cleared (or never was).
  local function mark_cleared(commits)
    call('RPUSH', commits, '\r')
    call('PEXPIRE', commits, REMEMBER_CLEARED)
  end

  local function unmark(commits)
    if call('LINDEX', commits, -1) == '\r' then
      call('RPOP', commits)
    end
  end

  make.mark_cleared, make.unmark = mark_cleared, unmark

  -- What a commit answers whose id is known; nothing if it may be applied.
  function make.known(commits, commit_id)
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
    if at.confirm then
      call('LSET', commits, place, commit_id)
    end
    if not value or value == '' then
      return 'k'
    elseif value == '!' then
      return 'A'
    end
    return 'a', value
  end

  -- The outcome of a commit that changes nothing: unless it did before. `state`: the hash, if there is one.
  function make.unchanged(state, k, commit_id, code, detail)
    local commits = keys[k + 2]
    if at.repeated then
      local before, answer = make.known(commits, commit_id)
      if before then
        return before, answer
      end
    end
    if earlier > 0 and code ~= 'L' then
      -- The copy that was sent earlier may still arrive, and would contradict this answer.
      unmark(commits)
      call('RPUSH', commits, commit_id, format('\t%s\t%016.0f', now_text, earlier))
      if state then
        if (tonumber(call('HGET', state, 'guard')) or 0) < earlier then
          call('HSET', state, 'guard', format('%.0f', earlier))
        end
      else
        mark_cleared(commits)
      end
    end
    return code, detail
  end

  -- Forgets the commits that are neither among the last ones nor could still arrive a second time.
  function make.forget(commits, length)
    local spare = length - 2 * REMEMBERED -- each id has at most one element that belongs to it
    while spare > 0 do
      local oldest, old = call('LRANGE', commits, 0, math.min(spare, 2 * REMEMBERED) - 1), 0
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

  function make.expire_at(k, time)
    local milliseconds = floor((time + 999) / 1000)
    call('PEXPIREAT', keys[k], milliseconds)
    call('PEXPIREAT', keys[k + 1], milliseconds)
    call('PEXPIREAT', keys[k + 2], math.max(milliseconds, floor(now / 1000) + REMEMBER_CLEARED))
  end

  -- Takes all that is pending in a space ('v' variables, 'm' metadata) back.
  function make.hide(pending, letter)
    for field in pairs(pending) do
      if byte(field) == letter then
        pending[field] = nil
      end
    end
  end

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

  -- The sum of two integers in decimal, exactly (a double has but 15 digits); nothing if one is too large or no integer.
  function make.sum(a, b)
    local high_a, low_a = parts_of(a)
    local high_b, low_b = parts_of(b)
    if not high_a or not high_b then
      return
    end
    local high, low = high_a + high_b, low_a + low_b
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

  -- Replaces AgentUp's document by what a commit makes of it, which the client has resolved. f: inside a turn.
  function make.convert(shape, a, k)
    local state, history, commits, commit_id = keys[k], keys[k + 1], keys[k + 2], args[a + 1]
    local document, answer = args[a + 2], args[a + 3]
    a = a + 4
    if at.late then
      return make.unchanged(nil, k, commit_id, 'L', '')
    end
    if byte(shape, 5) == 102 then
      if call('GET', keys[k + 3]) ~= args[a] then
        return make.unchanged(nil, k, commit_id, 'l')
      end
      a = a + 1
    end
    if call('TYPE', state).ok ~= 'string' or call('GET', state) ~= document then
      return 'z' -- not that document any more: begin again
    end
    local code, detail = make.known(commits, commit_id)
    if code then
      return code, detail
    end
    local count = tonumber(args[a])
    local remaining = call('PTTL', state)
    local messages = a + count + 1
    local remembered = messages + tonumber(args[messages]) + 1
    unmark(commits)
    local ids = {}
    for i = remembered + 1, remembered + tonumber(args[remembered]), 2 do
      ids[#ids + 1], ids[#ids + 2] = args[i], concat({ '\n', now_text, '\n', args[i + 1] })
    end
    ids[#ids + 1] = commit_id
    ids[#ids + 1] = concat({ '\n', now_text, '\n', #answer > LARGEST_KEPT and '!' or answer })
    call('RPUSH', commits, unpack(ids))
    at.wrote = true
    call('UNLINK', state)
    if count == 0 then -- the commit deletes it
      mark_cleared(commits)
    else
      local expires = (ttl > 0 and now + ttl) or (remaining > 0 and now + remaining * 1000)
      local set, fresh = { 'exp', expires and format('%.0f', expires) or '', 'guard', format('%.0f', now + WINDOW) }, {}
      for i = a + 1, a + count do
        set[#set + 1] = args[i]
      end
      make.each_thousand('HSET', state, set)
      for i = messages + 1, remembered - 1 do
        fresh[#fresh + 1] = args[i]
      end
      make.each_thousand('RPUSH', history, fresh)
      if expires then
        make.expire_at(k, expires)
      else
        call('PERSIST', commits)
      end
    end
    if answer == '' then
      return 'k'
    end
    return 'a', answer
  end

  -- Takes (t), renews (r) or gives back (l) the lease of a turn. u: bound to a user.
  function make.lease(shape, a, k)
    local id, token, milliseconds = args[a], args[a + 1], args[a + 2]
    if at.late then
      return 'L', ''
    end
    if byte(shape, 6) == 117 then
      local stored = attempt('HMGET', keys[k], 'id', 'user')
      if stored.err then
        return make.strange(stored, k)
      end
      if stored[1] and stored[1] ~= id then
        return 'i', stored[1]
      end
      if stored[1] and stored[2] ~= args[a + 3] then
        return 'o'
      end
    end
    local action, holder = byte(shape, 5), call('GET', keys[k + 3])
    if holder ~= token and (holder or action ~= 116) then
      return 'f'
    end
    if action == 108 then
      call('DEL', keys[k + 3])
    else
      call('SET', keys[k + 3], token, 'PX', milliseconds)
    end
    return 't'
  end

  -- A commit that failed before it wrote anything: where writing is refused (no memory left, a replica), it may have
  -- been applied before.
  function make.refused(commits, commit_id, problem)
    local fine, code, answer = pcall(make.known, commits, commit_id)
    if fine and code then
      return code, answer
    end
    return 'e', problem
  end

  return make
end

-- A change of a context. Letters of the conditions, which come first:
--   q the id was given by the caller; u bound to a user; f inside a turn; n not to exist; w idle for microseconds; e, g a variable has a value, is absent;
--   r what is answered if no change does
-- and of the changes, uppercase those that make an absent context exist:
--   A append a message; B append several; S set a key; M set several; Y, Z replace all variables, all metadata;
--   I increment; J the same, added up by the client; C exist; O exist, owned; T set the owner; R restore;
--   d drop a key; t trim; p pop; x delete
function at.commit(at, shape, a, k)
  local call, attempt, keys, args = redis.call, redis.pcall, KEYS, ARGV
  local byte, now, now_text, ttl, earlier = string.byte, at.now, at.now_text, at.ttl, at.earlier
  local state, history, commits, id, commit_id = keys[k], keys[k + 1], keys[k + 2], args[a], args[a + 1]
  a = a + 2
  local stored = attempt('HMGET', state, 'id', 'updated', 'rev', 'start', 'end', 'user', 'exp', 'guard')
  if stored.err then
    return at:seldom().strange(stored, k)
  end
  local exists = stored[1] and true
  if exists and stored[1] ~= id then
    return 'i', stored[1]
  elseif not exists and call('EXISTS', state) == 1 then
    return 'w', { state, 'hash' } -- somebody else's: ours has an id
  end
  local hash = exists and state
  if at.late then
    return at:seldom().unchanged(hash, k, commit_id, 'L', '')
  end

  local user, updated, revision, start, keep, expires, guard = '', 0, 0, 0, 0, '', 0
  if exists then
    updated, revision, start, keep = tonumber(stored[2]), tonumber(stored[3]), tonumber(stored[4]), tonumber(stored[5])
    user, expires, guard = stored[6], stored[7], tonumber(stored[8]) or 0
  end
  at.repeated = not exists or earlier > 0 or now <= guard -- whether the id may be among those remembered
  local first, last, owner = start, keep, user -- as stored
  local present, bound, created, restored = exists, '', false, false -- as the changes so far leave it
  local fresh, n -- messages to append: the table of several, the one, or none
  n = 0
  local answer, touched, deletes = '', false, false
  local counted = false -- whether the list of messages was found to be as long as it should be
  -- Keys that were set (or dropped: false); whether nothing that is stored in that space counts any more
  local pending, no_variables, no_metadata = nil, not exists, not exists

  for j = 5, #shape do
    local part = byte(shape, j)
    if part < 97 then
      if not present then
        present, user, created, touched = true, bound, true, true
      elseif part ~= 67 and part ~= 79 then -- all but C and O change something for sure
        touched = true
      end
    end
    if part == 65 then -- A
      if n == 0 then
        fresh = { args[a] }
      else
        fresh[n + 1] = args[a]
      end
      n = n + 1
      a = a + 1
    elseif part == 83 then -- S
      pending = pending or {}
      pending[args[a]] = args[a + 1]
      a = a + 2
    elseif part == 117 then -- u
      bound = args[a]
      if exists and user ~= bound then
        return at:seldom().unchanged(hash, k, commit_id, 'o')
      end
      a = a + 1
    elseif part == 116 then -- t
      touched = touched or present
      local stays = keep + n - tonumber(args[a])
      if stays > start then
        start = stays
        if start > keep then
          local rest = {}
          for i = start - keep + 1, n do
            rest[#rest + 1] = fresh[i]
          end
          fresh, keep, n = rest, start, #rest
        end
      end
      a = a + 1
    elseif part == 102 then -- f
      if call('GET', keys[k + 3]) ~= args[a] then
        return at:seldom().unchanged(hash, k, commit_id, 'l')
      end
      a = a + 1
    elseif part == 73 or part == 74 or part == 100 then -- I, J, d
      pending = pending or {}
      local field = args[a]
      local current = pending[field]
      if current == nil then
        local hidden = no_metadata
        if byte(field) == 118 then
          hidden = no_variables
        end
        current = not hidden and call('HGET', state, field)
      end
      if part == 100 then
        touched = touched or present
        answer = 'false'
        if current then
          answer = 'true'
          pending[field] = false
        end
        a = a + 1
      else
        local total
        if part == 73 then
          local before, by = current or '0', args[a + 1]
          if #before < 15 and #by < 15 and string.find(before, '^-?%d+$') and string.find(by, '^-?%d+$') then
            total = string.format('%.0f', before + by)
          else
            total = at:seldom().sum(before, by)
          end
          a = a + 2
        else -- from this value, or none
          total = current == (args[a + 1] == '1' and args[a + 2]) and args[a + 3]
          a = a + 4
        end
        if not total then
          return at:seldom().unchanged(hash, k, commit_id, 'u', { j - 5, current })
        end
        pending[field], answer = total, total
      end
    elseif part == 66 then -- B
      if n == 0 then
        fresh = {}
      end
      local count = tonumber(args[a])
      for i = a + 1, a + count do
        n = n + 1
        fresh[n] = args[i]
      end
      a = a + 1 + count
    elseif part == 77 or part == 89 or part == 90 then -- M, Y, Z
      pending = pending or {}
      if part == 89 then
        at:seldom().hide(pending, 118)
        no_variables = true
      elseif part == 90 then
        at:seldom().hide(pending, 109)
        no_metadata = true
      end
      local count = tonumber(args[a])
      for i = a + 1, a + 2 * count, 2 do
        pending[args[i]] = args[i + 1]
      end
      a = a + 1 + 2 * count
    elseif part == 112 then -- p
      touched = touched or present
      local count = math.min(tonumber(args[a]), keep + n - start)
      local popped, from_stored = {}, math.max(0, count - n)
      if from_stored > 0 then
        -- One more than there should be, if these are the last: so their number tells whether the list is as long as it
        -- should be.
        counted = keep == last or counted
        popped = call('LRANGE', history, keep - from_stored - first, keep - (keep == last and 0 or 1) - first)
        if #popped ~= from_stored then
          return 'b'
        end
        keep = keep - from_stored
      end
      local stays = n - (count - from_stored)
      for i = stays + 1, n do
        popped[#popped + 1] = fresh[i]
        fresh[i] = nil
      end
      n = stays
      answer = '[' .. table.concat(popped, ',') .. ']'
      a = a + 1
    elseif part == 120 then -- x
      touched = touched or present
      answer = present and 'true' or 'false'
      deletes, present, created, restored = true, false, false, false
      user, revision, start, keep, fresh, n = '', 0, 0, 0, nil, 0
      pending, no_variables, no_metadata = nil, true, true
    elseif part == 79 then -- O
      if user ~= args[a] then
        if user ~= '' then
          return at:seldom().unchanged(hash, k, commit_id, 'o')
        end
        user, touched = args[a], true
      end
      a = a + 1
    elseif part == 84 then -- T
      user = args[a]
      a = a + 1
    elseif part == 82 then -- R
      user = args[a]
      if not exists then
        start = tonumber(args[a + 1])
        keep = start
      end
      restored = a + 2 -- created, updated, revision, expires
      a = a + 6
    elseif part == 110 then -- n
      if exists then
        return at:seldom().unchanged(hash, k, commit_id, 'x')
      end
    elseif part == 119 then -- w
      if not exists or math.min(updated, now) > now - tonumber(args[a]) then
        return at:seldom().unchanged(hash, k, commit_id, 'a', 'false')
      end
      a = a + 1
    elseif part == 101 then -- e
      if (exists and call('HGET', state, args[a])) ~= args[a + 1] then
        return at:seldom().unchanged(hash, k, commit_id, 'a', '?')
      end
      a = a + 2
    elseif part == 103 then -- g
      if exists and call('HEXISTS', state, args[a]) == 1 then
        return at:seldom().unchanged(hash, k, commit_id, 'a', '?')
      end
      a = a + 1
    elseif part == 114 then -- r
      answer = args[a]
      a = a + 1
    elseif part == 113 then -- q
      at.repeated = true
    end
  end
  if not touched then
    local code, detail = 'k', nil
    if answer ~= '' then
      code, detail = 'a', answer
    end
    if at.repeated then
      return at:seldom().unchanged(hash, k, commit_id, code, detail)
    end
    return code, detail
  end

  -- `updated` never goes backwards.
  local time = now_text
  if updated >= now then
    time = string.format('%016.0f', updated + 1)
  end

  -- What could fail comes before the first write, or is the first write.
  local renewed = not exists or deletes -- whether there is nothing left of what is stored
  local debris = false
  if renewed then
    local kind = call('TYPE', history).ok
    if kind ~= 'none' and kind ~= 'list' then
      return 'w', { history, kind }
    end
    debris = kind == 'list' and not exists -- of a hash that somebody deleted
  elseif (start > first or keep < last) and not counted and call('LLEN', history) ~= last - first then
    return 'b'
  end
  local newest = exists or call('LINDEX', commits, -1) -- of the commits of a context that was here before, if any
  if at.repeated and newest then
    local code, detail = at:seldom().known(commits, commit_id)
    if code then
      return code, detail
    end
  end
  if created then
    guard = newest and now + WINDOW or 0 -- a copy of one of them may be on its way
  end
  if newest == '\r' then
    call('RPOP', commits)
  elseif deletes and exists then
    call('UNLINK', state, history) -- first: it needs no memory, and a script that has written is not refused any
    at.wrote = true
  end
  revision = revision + 1
  local remembered -- how many elements there are now
  if answer ~= '' or revision % REMEMBERED == 0 then -- now and then one with its time, for `forget`
    local kept = '\n' .. now_text .. '\n' .. (#answer > LARGEST_KEPT and '!' or answer)
    if present then
      remembered = call('RPUSH', commits, commit_id, kept)
    else -- deleted; that always has an answer
      remembered = call('RPUSH', commits, commit_id, kept, '\r')
    end
  else
    remembered = call('RPUSH', commits, commit_id)
  end
  at.wrote = true
  if debris then
    call('UNLINK', history)
  end
  if not present then
    if remembered > 2 * REMEMBERED then
      at:seldom().forget(commits, remembered)
    end
    call('PEXPIRE', commits, REMEMBER_CLEARED)
    return 'a', answer
  end

  -- The history
  if renewed then
    first, last = start, start
  elseif start > first or keep < last then
    last = math.min(keep, last)
    if start >= last then
      call('UNLINK', history)
      first, last = start, start
    else
      call('LTRIM', history, start - first, last - first - 1)
      first = start
    end
  end
  if n > 0 then
    local length
    if n == 1 then
      length = attempt('RPUSH', history, fresh[1])
    elseif n <= 1000 then
      length = attempt('RPUSH', history, unpack(fresh, 1, n))
    else
      length = at:seldom().each_thousand('RPUSH', history, fresh)
    end
    if length ~= last - first + n then
      -- Not the list that the hash counts on: somebody else changed it.
      if type(length) == 'number' then
        call('LTRIM', history, 0, -n - 1)
        length = 'b'
      else
        length = 'w'
      end
      call('RPOP', commits, (answer ~= '' or revision % REMEMBERED == 0) and 2 or 1)
      at.wrote = false
      return length, length == 'w' and { history, call('TYPE', history).ok } or nil
    end
  end
  -- The hash
  local stop = keep + n
  if not created and not pending and not restored and ttl == 0 and expires == '' and earlier <= guard
    and start == tonumber(stored[4]) and user == owner then
    call('HSET', state, 'updated', time, 'rev', revision, 'end', stop)
  else
    local expire = ttl > 0 and now + ttl
    local birth = now_text
    if restored then
      if args[restored + 1] ~= '' then time = args[restored + 1] end
      if args[restored + 3] ~= '' then expire = tonumber(args[restored + 3]) end
      if not exists and args[restored] ~= '' then birth = args[restored] end
      if not exists and args[restored + 2] ~= '' then revision = tonumber(args[restored + 2]) end
    end
    local set, gone
    local m = 6
    if created then
      set = { 'id', id, 'updated', time, 'rev', revision, 'start', start, 'end', stop, 'user', user,
        'exp', '', 'guard', string.format('%.0f', math.max(guard, earlier)), 'created', birth }
      m = 18
    else
      set = { 'updated', time, 'rev', revision, 'end', stop }
      if start ~= tonumber(stored[4]) then
        set[m + 1], set[m + 2] = 'start', start
        m = m + 2
      end
      if earlier > guard then
        set[m + 1], set[m + 2] = 'guard', string.format('%.0f', earlier)
        m = m + 2
      end
      if user ~= owner then
        set[m + 1], set[m + 2] = 'user', user
        m = m + 2
      end
    end
    if expire then
      set[m + 1], set[m + 2] = 'exp', string.format('%.0f', expire)
      m = m + 2
    elseif expires ~= '' then
      set[m + 1], set[m + 2] = 'exp', ''
      m = m + 2
    end
    if pending then
      for field, value in pairs(pending) do
        if value then
          set[m + 1], set[m + 2] = field, value
          m = m + 2
        elseif not renewed then
          gone = gone or {}
          gone[#gone + 1] = field
        end
      end
      if not renewed and (no_variables or no_metadata) then
        gone = gone or {}
        for _, field in ipairs(call('HKEYS', state)) do
          local letter, colon = byte(field, 1, 2)
          if colon == 58 and pending[field] == nil
            and ((letter == 118 and no_variables) or (letter == 109 and no_metadata)) then
            gone[#gone + 1] = field
          end
        end
      end
    end
    if m <= 1000 then
      call('HSET', state, unpack(set, 1, m))
    else
      at:seldom().each_thousand('HSET', state, set)
    end
    if gone then
      at:seldom().each_thousand('HDEL', state, gone)
    end
    if expire then
      at:seldom().expire_at(k, expire)
    elseif created then
      if newest then
        call('PERSIST', commits)
      end
    elseif expires ~= '' then
      call('PERSIST', state)
      call('PERSIST', history)
      call('PERSIST', commits)
    end
  end
  if revision % REMEMBERED == 0 then
    at:seldom().forget(commits, remembered)
  end
  if answer == '' then
    return 'k'
  end
  return 'a', answer
end

-- Reads. Parts: u bound to a user; h a window of the history; g all fields of the hash, or F so many.
function at.query(at, shape, a, k)
  local call, attempt, keys, args, byte = redis.call, redis.pcall, KEYS, ARGV, string.byte
  local state, history, id = keys[k], keys[k + 1], args[a]
  a = a + 1
  local stored, bound, window
  local everything = {}
  for j = 5, #shape do
    local part = byte(shape, j)
    if part == 117 then
      bound = args[a]
      a = a + 1
    elseif part == 104 then
      window = a
      a = a + 3
    elseif part == 70 then
      stored = attempt('HMGET', state, 'id', 'user', 'created', 'updated', 'rev', 'start', 'end', 'exp',
        unpack(args, a + 1, a + tonumber(args[a])))
    else
      stored = attempt('HMGET', state, 'id', 'user', 'created', 'updated', 'rev', 'start', 'end', 'exp')
      everything = nil
    end
  end
  if stored.err then
    return at:seldom().strange(stored, k)
  end
  if not stored[1] then
    if call('EXISTS', state) == 1 then
      return 'w', { state, 'hash' }
    end
    return 'n'
  end
  if stored[1] ~= id then
    return 'i', stored[1]
  end
  if bound and stored[2] ~= bound then
    return 'o'
  end
  if not window and everything then
    return 's', stored
  end
  local first, messages = stored[7], {}
  if window then
    local start, stop = tonumber(stored[6]), tonumber(stored[7])
    local from, before, limit = tonumber(args[window]), tonumber(args[window + 1]), tonumber(args[window + 2])
    local last = before and math.max(start, math.min(before, stop)) or stop
    local position = from and math.max(start, math.min(from, last)) or start
    if limit and from then
      last = math.min(last, position + limit)
    elseif limit then
      position = math.max(position, last - limit)
    end
    if call('LLEN', history) ~= stop - start then
      return 'b'
    end
    if position < last then
      messages = call('LRANGE', history, position - start, last - start - 1)
    end
    first = string.format('%.0f', position)
  end
  return 'S', { stored, first, messages, everything or call('HGETALL', state) }
end
end
until a > last
local header = now_text .. table.concat(codes)
if m == 1 then
  return header -- by itself: making an array of it costs as much as a command
end
results[1] = header
return results
