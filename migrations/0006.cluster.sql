-- What was told of the objects in a cluster, so that the next leader of the watch tells exactly what is missing.
-- depends: 0005.exchange

CREATE TABLE cluster_objects (
    provider_id bigint NOT NULL REFERENCES providers ON DELETE CASCADE,
    uid text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('pod', 'deployment', 'event', 'namespace', 'ingress')),
    -- No reference: what is left of a session in the cluster may outlive its row.
    session_id bigint,
    -- metadata.resourceVersion: what is older is not told any more.
    version bigint NOT NULL,
    -- Of what can be seen of it: another version with the same digest is no news.
    digest bigint NOT NULL,
    -- The JSON that was told last: what is told again when the object is found to be gone.
    told text NOT NULL,
    PRIMARY KEY (provider_id, uid)
)
-- Rows change all the time and in place: none of what changes is indexed.
WITH (fillfactor = 70);
