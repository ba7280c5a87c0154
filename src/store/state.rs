//! The resumable state that `run` reads at its start: a sled database with a row per run, and a row per node that
//! something happened to in a run that can go on.
//!
//! Nothing asks for the nodes of a run that has ended, so their rows go with its end, and a node whose result was there
//! before the run has none: what is written and read grows neither with the runs before nor with what is cached.
//!
//! sled is fast, but flushing it was measured to lose data at power loss unless its file is synced, and it can reopen
//! empty, refuse to open, or panic on a damaged page. So the journals are the truth: every transaction carries the
//! number of the journal line it stands for, the file is synced after it, and whatever does not agree with the
//! journals at the next start is set aside and made again from them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use deepgen_contract::id::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};

use super::journal::{self, JOURNAL_FILE, JournalError};
use super::layout::Layout;
use super::runs::{self, RunView};
use crate::run::event::{NodeState, Origin, RunResult};

/// Name of the database folder inside the state folder.
pub const DB_DIR: &str = "db";
/// sled's own log inside the database folder.
const DB_FILE: &str = "db";
/// Pages that sled keeps in memory: rows are written and read once.
const CACHE_BYTES: u64 = 4 * 1024 * 1024;
/// Time to wait for a database whose file is held. A process that a killed orchestrator had just begun holds what that one had
/// open until it becomes its program.
const PATIENCE: Duration = Duration::from_secs(1);
/// State of a node whose result was there before the run.
const CACHED: NodeState = NodeState::Done { origin: Origin::Cached };
/// Most rows of one transaction: sled keeps every version of a page that a transaction makes until it ends.
const MOST_ROWS: usize = 16;

/// State that cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The database said no.
    #[error("the state in {path} cannot be used")]
    Database {
        /// The database folder.
        path: PathBuf,
        /// The reason.
        source: sled::Error,
    },
    /// The database panicked.
    #[error("the state in {path} is damaged: {what}")]
    Panicked {
        /// The database folder.
        path: PathBuf,
        /// The panic's message.
        what: String,
    },
    /// A row cannot be read or written.
    #[error("a row of the state in {path} is of another program")]
    Row {
        /// The database folder.
        path: PathBuf,
        /// The reason.
        source: serde_json::Error,
    },
    /// A journal cannot be read, so that nothing is left to rebuild from.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The file system said no.
    #[error("cannot read or write {path}")]
    Io {
        /// Where.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// What the state holds of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRow {
    /// Name of the pipeline or experiment.
    pub pipeline: String,
    /// Identity of its plan.
    pub plan: String,
    /// How it ended, if it did.
    pub result: Option<RunResult>,
    /// Number of the journal line that the row stands for.
    pub last_seq: u64,
}

impl RunRow {
    /// Returns true when no process goes on with the run.
    pub fn has_ended(&self) -> bool {
        self.result.is_some_and(|result| result != RunResult::Stopped)
    }
}

/// What the state holds of a node in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Identity of its result.
    pub fingerprint: Fingerprint,
    /// Where it stands.
    pub state: NodeState,
    /// Attempts of the run that failed.
    pub failures: u32,
}

/// The open database. Only the process that holds the artifacts folder's lock has one.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    db: sled::Db,
    runs: sled::Tree,
    nodes: sled::Tree,
}

/// What had to be done to the state at its opening, for a person.
pub type Repairs = Vec<String>;

impl State {
    /// Opens the state, compares it with the journals, and makes again what is missing or damaged.
    ///
    /// # Errors
    /// When the journals cannot be read, or a fresh database cannot be made.
    pub fn open(layout: &Layout, now_ms: u64) -> Result<(Self, Repairs), StateError> {
        let path = layout.state().join(DB_DIR);
        let truth = journal_tails(layout)?;
        let mut repairs = Vec::new();
        let opened = guarded(&path, || Self::open_db(&path)).and_then(|state| {
            let rows = guarded(&path, || state.run_rows())?;
            guarded(&path, || state.check_nodes(&rows))?;
            Ok((state, rows))
        });
        match opened {
            Ok((state, rows)) => match compare(&rows, &truth) {
                Agreement::Same => Ok((state, repairs)),
                Agreement::Behind(late) => {
                    for run in &late {
                        state.rebuild_run(layout, run)?;
                    }
                    repairs.push(format!("brought the state of {} up to its journal", late.join(", ")));
                    Ok((state, repairs))
                }
                Agreement::Broken(why) => {
                    // Closing a damaged database may panic as opening it may.
                    let _ = guarded(&path, || {
                        drop(state);
                        Ok(())
                    });
                    Self::rebuild(layout, now_ms, &why)
                }
            },
            Err(error) => Self::rebuild(layout, now_ms, &chain(&error)),
        }
    }

    /// Sets the database aside and makes it again from the journals.
    ///
    /// # Errors
    /// As for [`State::open`].
    pub fn rebuild(layout: &Layout, now_ms: u64, why: &str) -> Result<(Self, Repairs), StateError> {
        let path = layout.state().join(DB_DIR);
        let mut old = String::new();
        if path.exists() {
            let aside = layout.state().join(format!("{DB_DIR}.damaged-{now_ms}"));
            fs::rename(&path, &aside).map_err(|source| StateError::Io { path: path.clone(), source })?;
            old = format!("; the old one is in {}", aside.display());
        }
        let state = guarded(&path, || Self::open_db(&path))?;
        let truth = journal_tails(layout)?;
        for run in truth.keys() {
            state.rebuild_run(layout, run)?;
        }
        Ok((state, vec![format!("rebuilt the state of {} runs from their journals ({why}){old}", truth.len())]))
    }

    /// Opens the state without a look at the journals: what it holds may be damaged or behind them.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn open_as_it_is(layout: &Layout) -> Result<Self, StateError> {
        let path = layout.state().join(DB_DIR);
        let state = guarded(&path, || Self::open_db(&path))?;
        guarded(&path, || state.run_rows())?;
        guarded(&path, || state.node_keys(|_, _| false))?;
        Ok(state)
    }

    fn open_db(path: &Path) -> Result<Self, StateError> {
        let error = |source| StateError::Database { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(|source| StateError::Io { path: path.to_owned(), source })?;
        // These options must stay as they are for databases that exist.
        let config =
            sled::Config::new().path(path).cache_capacity(CACHE_BYTES).mode(sled::Mode::LowSpace).flush_every_ms(None);
        let begun = Instant::now();
        let db = loop {
            match config.open() {
                Err(sled::Error::Io(error)) if is_held(&error) && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                opened => break opened.map_err(error)?,
            }
        };
        let runs = db.open_tree("runs").map_err(error)?;
        let nodes = db.open_tree("nodes").map_err(error)?;
        Ok(Self { path: path.to_owned(), db, runs, nodes })
    }

    /// Writes the rows of one transition, or of a batch of them, and returns when they are on disk. A node without a row
    /// loses the one it had; at the end of a run all rows of its nodes are removed.
    ///
    /// The run's row, which says up to which line of the journal the state reaches, comes after those that it speaks for:
    /// cut short before it, the state is behind its journal and is brought up. What is left over of a run that has ended is
    /// removed at the next opening.
    ///
    /// # Errors
    /// When the database cannot be written or is damaged.
    pub fn apply(
        &self,
        run: &str,
        row: &RunRow,
        nodes: impl IntoIterator<Item = (NodeName, Option<NodeRow>)>,
    ) -> Result<(), StateError> {
        let encode = |source| StateError::Row { path: self.path.clone(), source };
        let has_ended = row.has_ended();
        let row = serde_json::to_vec(row).map_err(encode)?;
        let nodes = nodes.into_iter().filter(|_| !has_ended).map(|(node, row)| {
            let row = row.as_ref().map(serde_json::to_vec).transpose().map_err(encode)?;
            Ok((node_key(run, &node), row))
        });
        let mut nodes = nodes.peekable();
        while nodes.peek().is_some() {
            // A few at a time: of ten thousand there is never a list.
            let rows = nodes.by_ref().take(MOST_ROWS).collect::<Result<Vec<_>, StateError>>()?;
            guarded(&self.path, || {
                let mut batch = sled::Batch::default();
                for (key, row) in rows {
                    match row {
                        Some(row) => batch.insert(key, row),
                        None => batch.remove(key),
                    }
                }
                self.nodes.apply_batch(batch).map_err(|source| self.database(source))
            })?;
        }
        guarded(&self.path, || {
            self.runs.insert(run.as_bytes(), row.as_slice()).map_err(|source| self.database(source))?;
            if has_ended {
                self.remove_run(run)?;
            }
            self.db.flush().map_err(|source| self.database(source))?;
            let file = self.path.join(DB_FILE);
            File::open(&file).and_then(|file| file.sync_all()).map_err(|source| StateError::Io { path: file, source })
        })
    }

    /// Returns the rows of all runs.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn run_rows(&self) -> Result<BTreeMap<String, RunRow>, StateError> {
        let mut rows = BTreeMap::new();
        for entry in &self.runs {
            let (key, value) = entry.map_err(|source| self.database(source))?;
            rows.insert(String::from_utf8_lossy(&key).into_owned(), self.decode(&value)?);
        }
        Ok(rows)
    }

    /// Returns the rows of a run's nodes; there are none of a run that has ended, nor of cached nodes.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn node_rows(&self, run: &str) -> Result<BTreeMap<NodeName, NodeRow>, StateError> {
        let prefix = node_key(run, &NodeName(String::new()));
        let mut rows = BTreeMap::new();
        for entry in self.nodes.scan_prefix(&prefix) {
            let (key, value) = entry.map_err(|source| self.database(source))?;
            let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
            rows.insert(NodeName(name), self.decode(&value)?);
        }
        Ok(rows)
    }

    /// Reads every page once, so that damage shows at the start and not in the middle of a run, and removes what a kill or
    /// an older program left of runs that have ended and of cached nodes.
    fn check_nodes(&self, runs: &BTreeMap<String, RunRow>) -> Result<(), StateError> {
        self.remove(&self.node_keys(|run, row| runs.get(run).is_some_and(RunRow::has_ended) || row.state == CACHED)?)
    }

    /// Reads every row and returns the keys of those that are `chosen` by their run and what they hold.
    fn node_keys(&self, chosen: impl Fn(&str, &NodeRow) -> bool) -> Result<Vec<sled::IVec>, StateError> {
        let mut keys = Vec::new();
        for entry in &self.nodes {
            let (key, value) = entry.map_err(|source| self.database(source))?;
            let row = self.decode::<NodeRow>(&value)?;
            let run = key.split(|&byte| byte == 0).next().unwrap_or_default();
            if std::str::from_utf8(run).is_ok_and(|run| chosen(run, &row)) {
                keys.push(key);
            }
        }
        Ok(keys)
    }

    /// Removes the rows of a run's nodes, a few at a time: of ten thousand there is never a list.
    fn remove_run(&self, run: &str) -> Result<(), StateError> {
        let prefix = node_key(run, &NodeName(String::new()));
        loop {
            let rows = self.nodes.scan_prefix(&prefix).keys().take(MOST_ROWS);
            let keys = rows.collect::<Result<Vec<_>, _>>().map_err(|source| self.database(source))?;
            if keys.is_empty() {
                return Ok(());
            }
            self.remove(&keys)?;
        }
    }

    fn remove(&self, keys: &[sled::IVec]) -> Result<(), StateError> {
        for keys in keys.chunks(MOST_ROWS) {
            let mut batch = sled::Batch::default();
            keys.iter().for_each(|key| batch.remove(key));
            self.nodes.apply_batch(batch).map_err(|source| self.database(source))?;
        }
        Ok(())
    }

    fn rebuild_run(&self, layout: &Layout, run: &str) -> Result<(), StateError> {
        let view = RunView::read(&layout.run(run))?;
        let rows = view.nodes.keys().map(|node| (node.clone(), node_row(&view, node)));
        self.apply(run, &run_row(&view), rows)
    }

    fn decode<'a, T: Deserialize<'a>>(&self, value: &'a [u8]) -> Result<T, StateError> {
        serde_json::from_slice(value).map_err(|source| StateError::Row { path: self.path.clone(), source })
    }

    fn database(&self, source: sled::Error) -> StateError {
        StateError::Database { path: self.path.clone(), source }
    }
}

/// Returns what the state holds of a run that looks like `view`.
pub fn run_row(view: &RunView) -> RunRow {
    RunRow { pipeline: view.pipeline.clone(), plan: view.plan.clone(), result: view.result, last_seq: view.last_seq }
}

/// Returns what the state holds of a node, if anything.
pub fn node_row(view: &RunView, node: &NodeName) -> Option<NodeRow> {
    let node = view.nodes.get(node).filter(|node| node.state != CACHED)?;
    Some(NodeRow { fingerprint: node.fingerprint, state: node.state.clone(), failures: node.failures })
}

fn node_key(run: &str, node: &NodeName) -> Vec<u8> {
    let mut key = run.as_bytes().to_vec();
    key.push(0);
    key.extend_from_slice(node.0.as_bytes());
    key
}

/// Returns the last line's number of every journal; a journal without a complete line says nothing.
fn journal_tails(layout: &Layout) -> Result<BTreeMap<String, u64>, StateError> {
    let mut tails = BTreeMap::new();
    for run in runs::list(layout) {
        if let Some(last) = journal::last(&layout.run(&run).join(JOURNAL_FILE))? {
            tails.insert(run, last.seq);
        }
    }
    Ok(tails)
}

/// How state and journals compare.
#[derive(Debug, PartialEq, Eq)]
enum Agreement {
    /// Nothing to do.
    Same,
    /// These runs lack their last lines: a crash between journal and state.
    Behind(Vec<String>),
    /// Something that no crash of this program explains.
    Broken(String),
}

fn compare(rows: &BTreeMap<String, RunRow>, truth: &BTreeMap<String, u64>) -> Agreement {
    if rows.is_empty() && truth.values().any(|seq| *seq > 1) {
        return Agreement::Broken("it was empty though there are journals".into());
    }
    let ahead = rows.iter().find(|(run, row)| truth.get(*run).is_some_and(|seq| row.last_seq > *seq));
    if let Some((run, row)) = ahead {
        return Agreement::Broken(format!("it was at line {} of {run}, whose journal ends before", row.last_seq));
    }
    let late = |(run, seq): (&String, &u64)| rows.get(run).is_none_or(|row| row.last_seq < *seq).then(|| run.clone());
    let late: Vec<String> = truth.iter().filter_map(late).collect();
    if late.is_empty() { Agreement::Same } else { Agreement::Behind(late) }
}

/// Returns true when sled says that another process holds the file; it has no kind of error for that.
fn is_held(error: &io::Error) -> bool {
    error.to_string().starts_with("could not acquire lock")
}

/// Runs `action` and turns a panic of the database into an error, without its message on standard error.
fn guarded<T>(path: &Path, action: impl FnOnce() -> Result<T, StateError>) -> Result<T, StateError> {
    // The panic hook belongs to the process; one caller at a time changes it.
    static HOOK: Mutex<()> = Mutex::new(());
    let _turn = HOOK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(AssertUnwindSafe(action));
    panic::set_hook(hook);
    result.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let what = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned();
        Err(StateError::Panicked { path: path.to_owned(), what })
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
