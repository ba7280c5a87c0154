//! The one way to write what happens: journal line, synced; then the state's transaction, synced; then return.
//!
//! Keeps the fold of the run's events beside, so that nobody has to read the journal back. Knows no reason for events.

use std::fs;
use std::path::{Path, PathBuf};

use super::journal::{JOURNAL_FILE, Journal, JournalError};
use super::layout::Layout;
use super::runs::RunView;
use super::state::{State, StateError, node_row, run_row};
use crate::run::event::RunEvent;

/// An open run.
#[derive(Debug)]
pub struct Recorder {
    run_dir: PathBuf,
    run: String,
    journal: Journal,
    state: State,
    view: RunView,
}

impl Recorder {
    /// Opens the journal of `run`, creating the run's folder when there is none.
    ///
    /// # Errors
    /// When the folder or the journal cannot be opened.
    pub fn open(layout: &Layout, run: &str, state: State) -> Result<Self, StateError> {
        let run_dir = layout.run(run);
        fs::create_dir_all(&run_dir).map_err(|source| StateError::Io { path: run_dir.clone(), source })?;
        let path = run_dir.join(JOURNAL_FILE);
        let journal = Journal::open(&path)?;
        super::journal::sync_parent(&run_dir).map_err(|source| JournalError::Io { path, source })?;
        let view = RunView::read(&run_dir)?;
        let rows: Vec<_> = view.nodes.keys().filter_map(|node| Some((node.clone(), node_row(&view, node)?))).collect();
        // The line number agrees, but a damaged page can lose one row and keep the other.
        if state.node_rows(run)? != rows.iter().cloned().collect() {
            tracing::warn!(run, "wrote the state of the run again from its journal");
            state.apply(run, &run_row(&view), &rows)?;
        }
        Ok(Self { run_dir, run: run.to_owned(), journal, state, view })
    }

    /// Makes events durable, in order; a caller acts on them only after this returns.
    ///
    /// # Errors
    /// When the journal or the state cannot be written.
    pub fn record(&mut self, events: &[RunEvent], now_ms: u64) -> Result<(), StateError> {
        if events.is_empty() {
            return Ok(());
        }
        for record in &self.journal.append(events, now_ms)? {
            self.view.apply(record);
        }
        let mut nodes = Vec::new();
        for event in events {
            if let RunEvent::Node { node, .. } = event
                && let Some(row) = node_row(&self.view, node)
            {
                nodes.push((node.clone(), row));
            }
        }
        self.state.apply(&self.run, &run_row(&self.view), &nodes)
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
