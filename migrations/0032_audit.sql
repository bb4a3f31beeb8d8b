-- Who changed what, or tried to. Bounded: the oldest entries go.
CREATE TABLE audit (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    t_ms       INTEGER NOT NULL,
    key_id     TEXT,              -- NULL: no key was asked for, or none was valid
    key_name   TEXT,              -- as it was then; no reference, so that the entry outlives the key
    address    TEXT NOT NULL,
    method     TEXT NOT NULL,
    path       TEXT NOT NULL,     -- without the query
    object     TEXT,              -- what was made, where the path does not name it
    status     INTEGER NOT NULL,  -- HTTP status; 499: the client went before the answer
    request_id TEXT NOT NULL
) STRICT;
