-- Holds a new connection until its backend has exactly one usable server. HAProxy's own rules look again only when the
-- time is over, and would so lengthen every switchover to it.
core.register_action("wait_for_primary", { "tcp-req" }, function(txn, backend, milliseconds)
  for _ = 1, tonumber(milliseconds) / 20 do
    if txn.f:nbsrv(backend) == 1 then
      return
    end
    core.msleep(20)
  end
end, 2)
