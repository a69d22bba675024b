CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public;
CREATE FUNCTION public.touch() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN NEW.updated_at := date_trunc('second', clock_timestamp()); RETURN NEW; END $$;
CREATE TABLE public.kdb_fast_rejects (
    entity_name text NOT NULL,
    record_id text NOT NULL,
    content_hash bytea NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL,
    "position" bigint DEFAULT 0 NOT NULL,
    run bigint NOT NULL,
    rejected_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.kdb_fast_runs (
    run bigint NOT NULL,
    state character varying(16) NOT NULL,
    phase character varying(64) DEFAULT 'start'::character varying NOT NULL,
    fingerprint character varying(64) NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    process_started double precision NOT NULL,
    started_at timestamp with time zone DEFAULT now() NOT NULL,
    heartbeat_at timestamp with time zone DEFAULT now() NOT NULL,
    ended_at timestamp with time zone,
    last_flush integer DEFAULT 0 NOT NULL,
    last_result text,
    receipt text
);
ALTER TABLE public.kdb_fast_runs ALTER COLUMN run ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.kdb_fast_runs_run_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.kdb_fast_state (
    key text NOT NULL,
    value text NOT NULL
);
CREATE TABLE public.kdb_search (
    id character varying(36) NOT NULL,
    entity_name character varying(255) NOT NULL,
    record_id character varying(36) NOT NULL,
    content text NOT NULL,
    embedding public.vector(8),
    model character varying(100),
    dimensions integer,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone,
    tsv tsvector GENERATED ALWAYS AS (to_tsvector('english'::regconfig, content)) STORED,
    kdb_fast_fingerprint character varying(64),
    kdb_fast_run bigint,
    kdb_fast_at timestamp with time zone,
    kdb_fast_source_at timestamp with time zone,
    kdb_fast_seal bytea
);
INSERT INTO public.kdb_fast_rejects VALUES ('Note', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx', '\xef35e142572e8198b661256c1e64e15e220337ce4dcbab6ac0561a6b9ac263c5', 'id_too_long', 'the record id has 40 characters, the index holds 36', 21, 4, '2026-11-29 20:37:00.875506+00');
INSERT INTO public.kdb_fast_rejects VALUES ('Note', 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy', '\xb64f50df73b3e0d08bbf11730f7b20348c77587eb727d49dee1cbe34417fb2b8', 'id_too_long', 'the record id has 251 characters, the index holds 36', 22, 4, '2026-11-29 20:37:00.875506+00');
INSERT INTO public.kdb_fast_rejects VALUES ('Note', '', '\x05c2fd097433491d574359630dcefa270ef5151ce844070d025a099597d13d29', 'invalid_json', 'not valid JSON at character 19: Expecting value', 23, 4, '2026-11-29 20:37:00.875506+00');
INSERT INTO public.kdb_fast_rejects VALUES ('Note', 'nul', '\xb0ec7f7e08423ceabe5cafc636d3d66d0d91347ebad87227983bafeda529941e', 'nul_byte', 'a NUL character (U+0000) cannot be stored in PostgreSQL text', 24, 4, '2026-11-29 20:37:00.875506+00');
INSERT INTO public.kdb_fast_rejects VALUES ('Note', 'café "quoted" \ back\nzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz', '\x9a6237ed04b2853494b213dd84f40c34d438a2e56dd3fdddaf94edf3668e1bfb', 'id_too_long', 'the record id has 51 characters, the index holds 36', 25, 4, '2026-11-29 20:37:00.875506+00');
INSERT INTO public.kdb_fast_runs OVERRIDING SYSTEM VALUE VALUES (1, 'done', 'end', '92350989e385f220', 'stub', 8, 'example', 22654, 1795984617.03, '2026-11-29 20:36:57.65688+00', '2026-11-29 20:36:57.700978+00', '2026-11-29 20:36:57.822405+00', 2, '[4, 812, 0, [], []]', '{"run": 1, "schema": "public", "state": "done", "input": "/data/notes.jsonl", "read": 25, "stored": 20, "unchanged": 0, "reused": 0, "superseded": 0, "rejected": 5, "empty": 0, "deleted": 0, "truncated": 0, "tokens": 20, "padded_tokens": 20, "seconds": 0.202, "records_per_second": 99.3, "tokens_per_second": 99.3, "model": "stub", "dimensions": 8, "precision": "fp32", "fidelity": null, "fingerprint": "92350989e385f220", "workers": 0, "plan": "in this process", "flushes": 2, "flush_size": "0.0 to 0.0 MB, at most 0.0 MB (the slots of the slab)", "bytes_written": 4080, "index": "deferred: about 20 of 25 rows change, a quarter or more; built ix_kdb_search_fts, ix_kdb_search_vector", "phases": {"prepare": 0.0, "start": 0.005, "embed": 0.008, "write": 0.007, "index": 0.096}, "peak_rss_bytes": 75116544, "peak_rss_by_process": {"parent": 75116544}, "warnings": [], "input_changed": false, "version": "0.1.0"}');
INSERT INTO public.kdb_fast_runs OVERRIDING SYSTEM VALUE VALUES (2, 'abandoned', 'start', '92350989e385f220', 'stub', 8, 'example', 22695, 1795984617.85, '2026-11-29 20:36:58.431828+00', '2026-11-29 20:36:58.431828+00', '2026-11-29 20:36:59.014032+00', 0, '2f2afbf85be94acba854bf3ddb22a664', NULL);
INSERT INTO public.kdb_fast_runs OVERRIDING SYSTEM VALUE VALUES (3, 'done', 'end', '92350989e385f220', 'stub', 8, 'example', 22722, 1795984618.42, '2026-11-29 20:36:59.014032+00', '2026-11-29 20:37:00.083415+00', '2026-11-29 20:37:00.162011+00', 1, '[2, 303, 0, [], []]', '{"run": 3, "schema": "public", "state": "done", "input": "/data/notes.jsonl", "read": 25, "stored": 2, "unchanged": 18, "reused": 0, "superseded": 0, "rejected": 5, "empty": 0, "deleted": 0, "truncated": 0, "tokens": 2, "padded_tokens": 2, "seconds": 1.188, "records_per_second": 1.7, "tokens_per_second": 1.7, "model": "stub", "dimensions": 8, "precision": "fp32", "fidelity": null, "fingerprint": "92350989e385f220", "workers": 2, "plan": "2 workers \u00d7 1 thread (2 CPUs usable); 70 slots of 8 rows (75 MB shared); batches of up to 512 tokens (the cache)", "flushes": 1, "flush_size": "0.0 to 0.0 MB, at most 0.1 MB (the slots of the slab)", "bytes_written": 303, "index": "kept: about 2 of 25 rows change, under a quarter", "phases": {"prepare": 0.0, "start": 0.04, "embed": 0.02, "write": 0.021, "index": 0.017}, "peak_rss_bytes": 264769536, "peak_rss_by_process": {"parent": 68157440, "worker-1": 69435392, "worker-2": 72560640, "writer": 54616064}, "warnings": ["updated_at of public.kdb_search does not stay as it is written (trigger touch). Rows are told by their text and vector instead, which costs time. To spare that, let a trigger leave a time alone that the writer sets: WHEN (NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at), on INSERT WHEN (NEW.updated_at IS NULL)."], "input_changed": false, "version": "0.1.0"}');
INSERT INTO public.kdb_fast_runs OVERRIDING SYSTEM VALUE VALUES (4, 'running', 'write', '92350989e385f220', 'stub', 8, 'example', 22809, 1795984620.22, '2026-11-29 20:37:00.837438+00', '2026-11-29 20:37:00.87614+00', NULL, 1, '[16, 2564, 0, [], []]', NULL);
INSERT INTO public.kdb_fast_state VALUES ('dropped_indexes', '[{"schema": "public", "table": "kdb_search", "name": "ix_kdb_search_fts", "using": "USING gin (tsv)", "vector": false, "partitioned": false, "valid": true, "tablespace": "", "comment": null, "statistics": {}, "parent": null, "fixed": false}, {"schema": "public", "table": "kdb_search", "name": "ix_kdb_search_vector", "using": "USING hnsw (embedding public.vector_cosine_ops)", "vector": true, "partitioned": false, "valid": true, "tablespace": "", "comment": null, "statistics": {}, "parent": null, "fixed": false}]');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7002-b480-d8238ab940ee', 'Note', '0', 'text: copper kettle number 0', '[0.36266226,0.6885213,-0.20340389,-0.058271438,0.3191116,-0.121569276,-0.41384113,-0.2485359]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:36:57.693978+00', DEFAULT, '92350989e385f220', 1, '2026-11-29 20:36:57.693978+00', NULL, NULL);
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7005-9cc1-d0d184ffd1ce', 'Note', '3', 'text: copper kettle number 3', '[0.64141345,-0.29362142,0.33721748,0.047327235,-0.09825822,-0.32643273,0.4125068,-0.31629884]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:36:57.693978+00', DEFAULT, '92350989e385f220', 1, '2026-11-29 20:36:57.693978+00', NULL, NULL);
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7003-8b5f-e677055cc98b', 'Note', '1', 'text: silver spoon', '[0.20286918,0.17879023,-0.21889211,0.7186064,0.21376643,-0.36497766,-0.2932863,-0.31248617]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 3, '2026-11-29 20:37:00.082254+00', NULL, '\x0e6509098cf9ad2df250b29116d8e989b8902acbf56eac4cacf242e5a44bffdd');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7004-955e-a972357a7532', 'Note', '2', 'text: tin cup', '[0.7232974,-0.015894664,0.21549323,0.63695955,-0.12851526,-0.08357732,0.0012430054,-0.030504165]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 3, '2026-11-29 20:37:00.082254+00', NULL, '\xc7f30a13e5012b7812949c467df26074ab3eaf43f834021ea31acd9afbd843fa');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7000-81e9-2a28acf5ae6f', 'Note', '10', 'text: iron pan number 10', '[-0.31724358,0.8506649,-0.18671383,0.097303756,0.12971917,-0.038306236,0.1803086,-0.2838838]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xa3738d8824bf780caa462469c55a68ac2ae99d96cdd92aa97d160374c7076242');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7001-b64d-d3bcd9647a0f', 'Note', '11', 'text: iron pan number 11', '[0.15265286,-0.07863819,-0.68929976,-0.011699433,0.38320473,0.58399844,-0.08097381,-0.028023845]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xfcfbb24fe34da3f60f65266958768658362203a3394b91ba108c823fc82ed1bd');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7002-8d45-181a70af33df', 'Note', '12', 'text: iron pan number 12', '[-0.23151088,-0.16120288,-0.59379566,-0.647433,0.20638062,-0.09685527,0.16611688,-0.26284015]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x4ae38969bb8a048cd0d3b2e23950b19e42c7721569359c8bd74b15520345193b');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7003-a390-08df1fe52e51', 'Note', '13', 'text: iron pan number 13', '[0.48018065,0.21117753,-0.7730784,-0.07667382,0.19761603,0.13139553,0.07964577,0.24215946]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x911de7aaea2898c1b325d9319e002b962c5f13deb28dcff64a1fb541098926e8');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7004-9cb9-eb5e01da37e1', 'Note', '14', 'text: iron pan number 14', '[-0.09488636,-0.419394,-0.5402601,0.03305336,0.191791,0.5210602,-0.36183754,0.28795457]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xb6cbad3ebe256561a25b38c3c89f9b923d61305f902e9895a7bfefd5efb64681');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7005-bbda-daa2b3ad1d1a', 'Note', '15', 'text: iron pan number 15', '[-0.49011898,0.31956568,-0.07458687,0.22398058,-0.66140985,0.0603826,0.37839398,0.13281411]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xbfe44351481874f1c487cd34c6e1dcb413d5e5e8014f18fbec12ed4dc4fef32b');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7006-8c79-29fd56846ce6', 'Note', '16', 'text: iron pan number 16', '[-0.03355285,-0.040589046,-0.6295308,-0.58097816,0.49038947,-0.13491249,0.061696004,-0.02987479]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xebe157b9707fe495bb04930c7341b3a32b563599936852a143f98b9c9a24d0cf');
INSERT INTO public.kdb_search VALUES ('01a22906-70df-7007-b8d4-9a482d4f57b3', 'Note', '17', 'text: iron pan number 17', '[0.0023112546,-0.17830747,0.28442556,0.52482533,-0.22373472,-0.5880778,0.2469728,-0.39366633]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x4f58a4be0d1359e183965fcf74dc49675f1a4a5d32dab820d00f1022facac41e');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7000-a4a1-bfa9297f0ed5', 'Note', '18', 'text: iron pan number 18', '[-0.35150406,0.4354005,-0.13685624,-0.14615753,-0.11697583,0.68008137,-0.36708996,-0.18928994]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xc05cf0b86d88e658e41e5c6a8f94b784d352372d36ac0551b97ded890aa6e069');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7001-99c6-0b3444b9ad6e', 'Note', '19', 'text: iron pan number 19', '[0.31258816,-0.14458947,-0.022921026,-0.42308405,-0.35182527,0.019051401,-0.40246215,0.644777]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xcb410facf7dcd8a1a05c123f317ee4368457789501be7434f1f0d3c88bc9a0af');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7006-ae56-ea35bf93dada', 'Note', '4', 'text: iron pan number 4', '[-0.55044806,-0.1224465,-0.104724094,-0.12690988,0.60599387,0.19639158,0.43960133,-0.23641686]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x243a996e3efba8ec00daea05360b202cb15435e6676b05db7bfca5b832a68399');
INSERT INTO public.kdb_search VALUES ('01a22906-70e0-7007-afb4-0590d2b74b05', 'Note', '5', 'text: iron pan number 5', '[-0.010852045,0.51240414,0.5186495,0.015329552,0.20702018,0.055145174,0.63612425,-0.13243708]', 'stub', 8, '2026-11-29 20:36:57.693978+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x9a9f7d2f5749c2eb6dc1ab10f8b7e2b047016aebe097996cad322a52110b5aba');
INSERT INTO public.kdb_search VALUES ('01a22906-70e5-7000-a336-f82ab954c16c', 'Note', '6', 'text: iron pan number 6', '[-0.6013459,-0.3281065,0.2504429,0.5609992,-0.26253074,-0.25576776,0.13418752,0.030685779]', 'stub', 8, '2026-11-29 20:36:57.700681+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xd32a7944fcd29997172c6d5834ea17af39f5a97ef832119ad0fc5bad6df5eadc');
INSERT INTO public.kdb_search VALUES ('01a22906-70e5-7001-939e-ed5be4b93f9c', 'Note', '7', 'text: iron pan number 7', '[-0.09020196,0.06025392,0.30430296,0.3083561,0.64891934,0.4297666,-0.24158707,-0.36930922]', 'stub', 8, '2026-11-29 20:36:57.700681+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\x1ae1f3029ecb4841fbe9f55d4f4a9629192cec4ed0654455514709da83f0c198');
INSERT INTO public.kdb_search VALUES ('01a22906-70e5-7002-bb8d-4277d2374588', 'Note', '8', 'text: iron pan number 8', '[-0.31541213,-0.4846353,-0.6163183,-0.31073877,-0.3310898,0.2325231,0.1500259,-0.055152733]', 'stub', 8, '2026-11-29 20:36:57.700681+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xbe258ce14854b0d35d95c67f1874d627815670f686800aa2c52e0a98cef7b456');
INSERT INTO public.kdb_search VALUES ('01a22906-70e5-7003-94a2-3ff2fabd4809', 'Note', '9', 'text: iron pan number 9', '[-0.37289813,-0.19315617,0.17709453,0.22052829,0.35461932,-0.7248353,0.053666204,-0.29936826]', 'stub', 8, '2026-11-29 20:36:57.700681+00', '2026-11-29 20:37:00+00', DEFAULT, '92350989e385f220', 4, '2026-11-29 20:37:00.875506+00', NULL, '\xed2f5ded79a54ae451c6d883483a12115be5f9e52ea328d85611bb155e24e215');
SELECT pg_catalog.setval('public.kdb_fast_runs_run_seq', 4, true);
ALTER TABLE ONLY public.kdb_fast_rejects
    ADD CONSTRAINT kdb_fast_rejects_pkey PRIMARY KEY (entity_name, record_id, content_hash, "position");
ALTER TABLE ONLY public.kdb_fast_runs
    ADD CONSTRAINT kdb_fast_runs_pkey PRIMARY KEY (run);
ALTER TABLE ONLY public.kdb_fast_state
    ADD CONSTRAINT kdb_fast_state_pkey PRIMARY KEY (key);
ALTER TABLE ONLY public.kdb_search
    ADD CONSTRAINT kdb_search_entity_name_record_id_key UNIQUE (entity_name, record_id);
ALTER TABLE ONLY public.kdb_search
    ADD CONSTRAINT kdb_search_pkey PRIMARY KEY (id);
CREATE INDEX ix_kdb_search_entity ON public.kdb_search USING btree (entity_name);
CREATE INDEX ix_kdb_search_record ON public.kdb_search USING btree (record_id);
CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON public.kdb_search FOR EACH ROW EXECUTE FUNCTION public.touch();
