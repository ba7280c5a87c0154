//! The one way to write what happens: the journal line first, then, for many lines at once, the disk and the state.
//!
//! [`Recorder::record`] returns when the lines are written: they survive the death of this process, and what follows
//! from them may begin. A thread beside makes them durable in groups, which is one sync of the journal (of the whole
//! file system when results were sealed, so that these are durable first) and one transaction of the state; only then
//! is anybody told. Keeps the fold of the run's events. Knows no reason for events.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use deepgen_contract::id::NodeName;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::journal::{JOURNAL_FILE, Journal, JournalError};
use super::layout::Layout;
use super::runs::RunView;
use super::state::{NodeRow, RunRow, State, StateError, node_row, run_row};
use crate::run::event::RunEvent;

/// Least and most time that lines wait for others to become durable with them, unless somebody waits. Only what is shown
/// waits for it.
const GROUP_TIME: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_millis(500);

/// How many times as long as making a group durable took the next one waits: each sync makes the file system write all the
/// folders anew that have changed, and holds up whoever makes files meanwhile.
const GROUP_PACE: u32 = 20;

/// Most lines of one write: a run of ten thousand nodes begins with as many.
const MOST_LINES: usize = 512;

/// Lines up to this number are durable, or why they cannot become so.
pub type Durable = Result<u64, StateError>;

/// An open run.
#[derive(Debug)]
pub struct Recorder {
    run_dir: PathBuf,
    journal: Journal,
    view: RunView,
    queue: Arc<Queue>,
    durable: UnboundedReceiver<Durable>,
    durable_seq: u64,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Opens the journal of `run`, creating the run's folder when there is none.
    ///
    /// # Errors
    /// When the folder or the journal cannot be opened.
    pub fn open(layout: &Layout, run: &str, state: State) -> Result<Self, StateError> {
        let run_dir = layout.run(run);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { path, source }
        };
        fs::create_dir_all(&run_dir).map_err(at(&run_dir))?;
        let path = run_dir.join(JOURNAL_FILE);
        let journal = Journal::open(&path)?;
        super::journal::sync_parent(&run_dir).map_err(|source| JournalError::Io { path, source })?;
        let view = RunView::read(&run_dir)?;
        let rows: BTreeMap<_, _> =
            view.nodes.keys().filter_map(|node| Some((node.clone(), node_row(&view, node)?))).collect();
        let row = run_row(&view);
        let stored = state.node_rows(run)?;
        // The line number agrees, but a damaged page can lose one row and keep the other.
        if !row.has_ended() && stored != rows {
            tracing::warn!(run, "wrote the state of the run again from its journal");
            let removed = stored.into_keys().filter(|node| !rows.contains_key(node)).map(|node| (node, None));
            let removed: Vec<_> = removed.collect();
            let kept = rows.into_iter().map(|(node, row)| (node, Some(row)));
            state.apply(run, &row, removed.into_iter().chain(kept))?;
        }
        let queue = Arc::new(Queue::default());
        let (told, durable) = unbounded_channel();
        let group = Group {
            run: run.to_owned(),
            queue: queue.clone(),
            file: journal.file().map_err(at(&run_dir))?,
            results: File::open(layout.root()).map_err(at(layout.root()))?,
            state,
            told,
        };
        let thread = std::thread::Builder::new().name("recorder".into()).spawn(move || group.serve());
        let thread = Some(thread.map_err(at(&run_dir))?);
        let durable_seq = journal.seq();
        Ok(Self { run_dir, journal, view, queue, durable, durable_seq, thread })
    }

    /// Writes events down, in order, and returns the number of the last line; it is not durable yet.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn record(&mut self, events: &[RunEvent], now_ms: u64) -> Result<u64, StateError> {
        if events.is_empty() {
            return Ok(self.journal.seq());
        }
        let (mut nodes, mut has_results) = (Vec::new(), false);
        for events in events.chunks(MOST_LINES) {
            for record in self.journal.append(events, now_ms)? {
                let RunEvent::Node { node, state, .. } = &record.event else {
                    self.view.apply(&record);
                    continue;
                };
                let had_row = node_row(&self.view, node).is_some();
                self.view.apply(&record);
                let row = node_row(&self.view, node);
                has_results |= state.is_done();
                if had_row || row.is_some() {
                    nodes.push((node.clone(), row));
                }
            }
        }
        let seq = self.journal.seq();
        self.queue.add(seq, run_row(&self.view), nodes, has_results);
        Ok(seq)
    }

    /// Waits until lines have become durable and returns the number of the last that is.
    ///
    /// # Errors
    /// When lines cannot become durable.
    pub async fn durable(&mut self) -> Durable {
        let told = self.durable.recv().await;
        self.hear(told)
    }

    /// Asks for everything that was written to become durable without waiting for more.
    pub fn hurry(&mut self) {
        self.queue.hurry();
    }

    /// Returns true when everything that was written is durable, as far as was heard.
    pub fn is_durable(&self) -> bool {
        self.durable_seq >= self.journal.seq()
    }

    /// Returns when everything that was written is durable; not to be called where others wait.
    ///
    /// # Errors
    /// When it cannot become so.
    pub fn sync(&mut self) -> Result<(), StateError> {
        self.hurry();
        while !self.is_durable() {
            let told = self.durable.blocking_recv();
            self.hear(told)?;
        }
        Ok(())
    }

    fn hear(&mut self, told: Option<Durable>) -> Durable {
        let gone = || StateError::Panicked { path: self.run_dir.clone(), what: "nothing is written any more".into() };
        self.durable_seq = told.unwrap_or_else(|| Err(gone()))?;
        Ok(self.durable_seq)
    }

    /// Returns the run so far.
    pub fn view(&self) -> &RunView {
        &self.view
    }

    /// Returns the run's folder.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // The thread ends when it has done what it was told.
        self.queue.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread beside: makes lines durable in groups.
struct Group {
    run: String,
    queue: Arc<Queue>,
    file: File,
    results: File,
    state: State,
    told: UnboundedSender<Durable>,
}

impl Group {
    fn serve(self) {
        let mut wait = *GROUP_TIME.start();
        while let Some(lines) = self.queue.next(wait) {
            let begun = Instant::now();
            let made = self.make_durable(lines);
            wait = pace(begun.elapsed());
            let is_broken = made.is_err();
            // Whoever waits hears why.
            let _ = self.told.send(made);
            if is_broken {
                return;
            }
        }
    }

    /// Results first, then the journal that speaks of them, then the state that can be made from it.
    fn make_durable(&self, lines: Lines) -> Durable {
        let io = |source| StateError::Io { path: PathBuf::from(&self.run), source };
        if lines.has_results {
            rustix::fs::syncfs(&self.results).map_err(|error| io(error.into()))?;
        }
        self.file.sync_data().map_err(io)?;
        self.state.apply(&self.run, &lines.row, lines.nodes)?;
        Ok(lines.seq)
    }
}

/// Returns how long a group waits for more lines when the last took `cost` to become durable.
fn pace(cost: Duration) -> Duration {
    cost.saturating_mul(GROUP_PACE).clamp(*GROUP_TIME.start(), *GROUP_TIME.end())
}

/// Lines that become durable together.
#[derive(Debug)]
struct Lines {
    /// Number of the last.
    seq: u64,
    /// The run after it.
    row: RunRow,
    /// The nodes they speak of, each as the last line left it.
    nodes: BTreeMap<NodeName, Option<NodeRow>>,
    /// True when results were sealed.
    has_results: bool,
}

/// What is written and not durable. Lines are added without waking the thread that waits for the time of their group to pass: a
/// run of short nodes adds thousands a second.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Option<Lines>,
    /// Somebody waits for them.
    is_urgent: bool,
    /// No more will come.
    is_closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, seq: u64, row: RunRow, nodes: Vec<(NodeName, Option<NodeRow>)>, has_results: bool) {
        let mut waiting = self.lock();
        match &mut waiting.lines {
            Some(lines) => {
                (lines.seq, lines.row) = (seq, row);
                lines.nodes.extend(nodes);
                lines.has_results |= has_results;
            }
            none => {
                *none = Some(Lines { seq, row, nodes: nodes.into_iter().collect(), has_results });
                self.changed.notify_one();
            }
        }
    }

    fn hurry(&self) {
        let mut waiting = self.lock();
        waiting.is_urgent = waiting.lines.is_some();
        self.changed.notify_one();
    }

    fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_one();
    }

    /// Waits for the first line, then for others until the time to `wait` is over or somebody waits for them; nothing when
    /// no more will come.
    fn next(&self, wait: Duration) -> Option<Lines> {
        let is_idle = |waiting: &mut Waiting| waiting.lines.is_none() && !waiting.is_closed;
        let waiting = self.changed.wait_while(self.lock(), is_idle).unwrap_or_else(PoisonError::into_inner);
        let may_wait = |waiting: &mut Waiting| !waiting.is_urgent && !waiting.is_closed;
        let waited = self.changed.wait_timeout_while(waiting, wait, may_wait);
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        waiting.is_urgent = false;
        waiting.lines.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::event::{NodeState, Origin};
    use deepgen_contract::id::Fingerprint;

    #[test]
    fn a_group_waits_in_proportion_to_what_the_last_one_cost() {
        let ms = Duration::from_millis;
        assert_eq!(pace(Duration::ZERO), ms(200), "it is shown soon where the disk is quick");
        assert_eq!(pace(ms(15)), ms(300));
        assert_eq!(pace(Duration::from_secs(30)), ms(500), "it is shown at all where the disk is slow");
        assert_eq!(pace(Duration::MAX), ms(500));
    }

    #[test]
    fn lines_wait_for_others_unless_somebody_waits_for_them() {
        let (queue, row) = (Queue::default(), run_row(&RunView::default()));
        let (a, b) = (NodeName("a".into()), NodeName("b".into()));
        let state = NodeState::Done { origin: Origin::Cached };
        let done = NodeRow { fingerprint: Fingerprint([1; 32]), state, failures: 0 };
        let has = |node: &NodeName| (node.clone(), Some(done.clone()));
        queue.add(1, row.clone(), vec![has(&a), has(&b)], true);
        queue.add(2, row.clone(), vec![(a.clone(), None)], false);
        queue.hurry();
        let lines = queue.next(Duration::from_secs(60)).unwrap();
        assert_eq!((lines.seq, lines.has_results), (2, true));
        assert_eq!(lines.nodes, BTreeMap::from([(a, None), has(&b)]), "the last line of a node counts");
        queue.add(3, row, Vec::new(), false);
        let begun = Instant::now();
        assert_eq!(queue.next(Duration::from_millis(20)).unwrap().seq, 3);
        assert!(begun.elapsed() >= Duration::from_millis(20), "what was asked for is forgotten");
        queue.close();
        assert!(queue.next(Duration::from_secs(60)).is_none());
    }
}
