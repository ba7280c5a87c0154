//! The one way to write what happens: the journal line first, then, for many lines at once, the disk and the state.
//!
//! [`Recorder::record`] returns when the lines are written: they survive the death of this process, and what follows
//! from them may begin. A thread beside makes them durable in groups, which is one sync of the journal (of the whole
//! file system when results were sealed, so that these are durable first) and one transaction of the state; only then
//! is anybody told. Keeps the fold of the run's events. Knows no reason for events.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use deepgen_contract::id::NodeName;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::journal::{JOURNAL_FILE, Journal, JournalError};
use super::layout::Layout;
use super::runs::RunView;
use super::state::{NodeRow, RunRow, State, StateError, node_row, run_row};
use crate::run::event::RunEvent;

/// Time that lines wait for others to become durable with them, unless somebody waits. Only what is shown waits for it;
/// each sync makes the file system write all the folders anew that have changed, so many of them slow down a run of short nodes.
const GROUP_TIME: Duration = Duration::from_millis(200);

/// Most lines of one write: a run of ten thousand nodes begins with as many.
const MOST_LINES: usize = 512;

/// What the thread beside is told.
enum Order {
    /// These lines are written.
    Lines { seq: u64, row: RunRow, nodes: Vec<(NodeName, Option<NodeRow>)>, has_results: bool },
    /// Somebody waits.
    Now,
}

/// Lines up to this number are durable, or why they cannot become so.
pub type Durable = Result<u64, StateError>;

/// An open run.
#[derive(Debug)]
pub struct Recorder {
    run_dir: PathBuf,
    journal: Journal,
    view: RunView,
    orders: Option<Sender<Order>>,
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
            state.apply(run, &row, &removed.into_iter().chain(kept).collect::<Vec<_>>())?;
        }
        let (orders, received) = channel();
        let (told, durable) = unbounded_channel();
        let group = Group {
            run: run.to_owned(),
            file: journal.file().map_err(at(&run_dir))?,
            results: File::open(layout.root()).map_err(at(layout.root()))?,
            state,
            told,
        };
        let thread = std::thread::Builder::new().name("recorder".into()).spawn(move || group.serve(&received));
        let thread = Some(thread.map_err(at(&run_dir))?);
        let durable_seq = journal.seq();
        Ok(Self { run_dir, journal, view, orders: Some(orders), durable, durable_seq, thread })
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
        let lines = Order::Lines { seq, row: run_row(&self.view), nodes, has_results };
        // When the thread has gone it has said why, and whoever waits for it hears that.
        let _ = self.orders.as_ref().map(|orders| orders.send(lines));
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
        let _ = self.orders.as_ref().map(|orders| orders.send(Order::Now));
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
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread beside: makes lines durable in groups.
struct Group {
    run: String,
    file: File,
    results: File,
    state: State,
    told: UnboundedSender<Durable>,
}

impl Group {
    fn serve(self, orders: &Receiver<Order>) {
        while let Ok(first) = orders.recv() {
            let mut gathered = Gathered::default();
            let mut is_open = gathered.take(first);
            let end = Instant::now() + GROUP_TIME;
            while is_open {
                match orders.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(order) => is_open = gathered.take(order),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                }
            }
            while let Ok(order) = orders.try_recv() {
                gathered.take(order);
            }
            let Some((seq, row)) = gathered.last.take() else { continue };
            let made = self.make_durable(&row, gathered);
            let is_broken = made.is_err();
            let _ = self.told.send(made.map(|()| seq));
            if is_broken {
                return;
            }
        }
    }

    /// Results first, then the journal that speaks of them, then the state that can be made from it.
    fn make_durable(&self, row: &RunRow, gathered: Gathered) -> Result<(), StateError> {
        let io = |source| StateError::Io { path: PathBuf::from(&self.run), source };
        if gathered.has_results {
            rustix::fs::syncfs(&self.results).map_err(|error| io(error.into()))?;
        }
        self.file.sync_data().map_err(io)?;
        self.state.apply(&self.run, row, &gathered.nodes.into_iter().collect::<Vec<_>>())
    }
}

/// Lines that become durable together; of a node only its last row counts.
#[derive(Default)]
struct Gathered {
    last: Option<(u64, RunRow)>,
    nodes: BTreeMap<NodeName, Option<NodeRow>>,
    has_results: bool,
}

impl Gathered {
    /// Takes an order in and returns false when there is no time to wait for more.
    fn take(&mut self, order: Order) -> bool {
        match order {
            Order::Now => false,
            Order::Lines { seq, row, nodes, has_results } => {
                self.last = Some((seq, row));
                self.nodes.extend(nodes);
                self.has_results |= has_results;
                true
            }
        }
    }
}
