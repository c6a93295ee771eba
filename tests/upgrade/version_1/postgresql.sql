CREATE TABLE aftercommit_batch (
	task_id UUID NOT NULL, 
	batch VARCHAR(255) NOT NULL, 
	lane INTEGER NOT NULL, 
	position JSON NOT NULL, 
	succeeded BIGINT NOT NULL, 
	failed BIGINT NOT NULL, 
	failures JSON NOT NULL, 
	commits BIGINT NOT NULL, 
	is_finished INTEGER NOT NULL, 
	PRIMARY KEY (task_id, batch, lane)
);

CREATE TABLE aftercommit_event (
	id UUID NOT NULL, 
	event VARCHAR(255) NOT NULL, 
	key VARCHAR(255) NOT NULL, 
	published_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	PRIMARY KEY (id)
);

CREATE UNIQUE INDEX aftercommit_event_key ON aftercommit_event (event, key);

CREATE INDEX aftercommit_event_published ON aftercommit_event (published_at);

CREATE TABLE aftercommit_pool (
	name VARCHAR(63) NOT NULL, 
	paused_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	PRIMARY KEY (name)
);

CREATE TABLE aftercommit_progress (
	task_id UUID NOT NULL, 
	done BIGINT NOT NULL, 
	total BIGINT, 
	PRIMARY KEY (task_id)
);

CREATE TABLE aftercommit_schema (
	id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id)
);

CREATE TABLE aftercommit_task (
	id UUID NOT NULL, 
	task VARCHAR(255) NOT NULL, 
	pool VARCHAR(63) NOT NULL, 
	state VARCHAR(9) NOT NULL, 
	arguments JSON NOT NULL, 
	result JSON, 
	key VARCHAR(255), 
	queued_key VARCHAR(255), 
	priority INTEGER DEFAULT 0 NOT NULL, 
	attempt INTEGER DEFAULT 0 NOT NULL, 
	max_attempts INTEGER DEFAULT 5 NOT NULL, 
	claims INTEGER DEFAULT 0 NOT NULL, 
	run_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	enqueued_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	started_at TIMESTAMP WITH TIME ZONE, 
	finished_at TIMESTAMP WITH TIME ZONE, 
	worker UUID, 
	parent UUID, 
	context JSON, 
	checkpoint JSON, 
	error TEXT, 
	traceback TEXT, 
	errors JSON, 
	PRIMARY KEY (id)
);

CREATE INDEX aftercommit_task_due ON aftercommit_task (pool, priority DESC, run_at, id) WHERE state = 'queued';

CREATE INDEX aftercommit_task_finished ON aftercommit_task (finished_at) WHERE finished_at IS NOT NULL;

CREATE INDEX aftercommit_task_held ON aftercommit_task (worker) WHERE state = 'running';

CREATE UNIQUE INDEX aftercommit_task_key ON aftercommit_task (task, queued_key);

CREATE INDEX aftercommit_task_waiting ON aftercommit_task (pool, task, priority, run_at, id) WHERE state = 'queued';

CREATE TABLE aftercommit_worker (
	id UUID NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	pid INTEGER NOT NULL, 
	started_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	seen_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	pools JSON NOT NULL, 
	names JSON NOT NULL, 
	PRIMARY KEY (id)
);

ALTER TABLE aftercommit_task SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02);

INSERT INTO aftercommit_schema (id, version) VALUES (1, 1);
