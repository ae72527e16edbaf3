-- Events that a committed transaction has made and that the log has not confirmed yet.
-- depends: 0002.sessions

CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id uuid NOT NULL DEFAULT gen_random_uuid(),
    event_type text NOT NULL,
    channel text NOT NULL,
    -- The JSON of `data`, kept as text: it is never looked into here.
    data text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The relay listens; a notification at commit spares it the wait until its next poll.
CREATE FUNCTION notify_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY outbox;
    RETURN NULL;
END $$;
CREATE TRIGGER outbox_notify AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION notify_outbox();

-- The same for the reconcile loop: a request that changes what is wanted.
CREATE FUNCTION notify_sessions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY sessions;
    RETURN NULL;
END $$;
CREATE TRIGGER sessions_notify_insert AFTER INSERT ON sessions FOR EACH STATEMENT EXECUTE FUNCTION notify_sessions();
CREATE TRIGGER sessions_notify_update AFTER UPDATE OF generation ON sessions
    FOR EACH STATEMENT EXECUTE FUNCTION notify_sessions();
