//! The state compared with the journals, changing nothing: what differs, and what a kill at the wrong moment left undone.
//!
//! A row is made from lines of a journal that were written before it. Rows that are what the journal said up to some line are
//! only behind; the next opening makes up for it.

use crate::store::journal::{self, JOURNAL_FILE};
use crate::store::layout::Layout;
use crate::store::runs::{self, RunView};
use crate::store::state::{State, StateError, node_row, run_row};

/// What a comparison found, for a person.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verification {
    /// What no kill of this program explains.
    pub differences: Vec<String>,
    /// Runs whose last lines are not in the state yet.
    pub behind: Vec<String>,
}

/// Compares every row with the journals.
///
/// # Errors
/// When the database or a journal cannot be read.
pub fn verify(layout: &Layout) -> Result<Verification, StateError> {
    let state = State::open_as_it_is(layout)?;
    let rows = state.run_rows()?;
    let mut found = Verification::default();
    let mut unknown = rows.clone();
    for run in runs::list(layout) {
        let records = journal::read(&layout.run(&run).join(JOURNAL_FILE))?.records;
        let row = rows.get(&run);
        unknown.remove(&run);
        let known = row.map_or(0, |row| row.last_seq);
        let count = records.iter().take_while(|record| record.seq <= known).count();
        let view = RunView::fold(&records[..count]);
        // Nothing follows a run's first line before its row is there.
        let is_same_run = row.map_or(records.len() <= 1, |row| *row == run_row(&view));
        let nodes = view.nodes.keys().filter_map(|node| Some((node.clone(), node_row(&view, node)?)));
        // Nothing asks for the nodes of a run that has ended.
        let is_same_nodes = run_row(&view).has_ended() || state.node_rows(&run)? == nodes.collect();
        if !is_same_run {
            found.differences.push(format!("{run} differs from its journal"));
        }
        if !is_same_nodes {
            found.differences.push(format!("nodes of {run} differ from its journal"));
        }
        if is_same_run && is_same_nodes && count < records.len() {
            let num = records.len() - count;
            found.behind.push(format!(
                "{run} lacks the last {num} of {} lines of its journal, as after a kill: the next run makes up for it",
                records.len()
            ));
        }
    }
    found.differences.extend(unknown.keys().map(|run| format!("{run} is in the state and has no journal")));
    Ok(found)
}
