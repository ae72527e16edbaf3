DROP TRIGGER sessions_notify_update ON sessions;
DROP TRIGGER sessions_notify_insert ON sessions;
DROP FUNCTION notify_sessions();
DROP TABLE outbox;
DROP FUNCTION notify_outbox();
