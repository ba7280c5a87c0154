//! Progress for terminals: a bar per running node with its position, loss, rate and time left, a line that counts the
//! others below, and what a person should not miss above.

use std::collections::BTreeMap;
use std::time::Duration;

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::NodeName;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::duration;
use super::pace::Pace;
use super::plain::{Teller, remark};
use super::progress::{Progress, Summary};
use crate::run::event::{NodeState, RunEvent};

const BAR: &str = "{prefix:<24!} [{bar:24}] {msg}";
/// Running nodes that have a bar of their own; more would not fit on a screen.
const NUM_BARS: usize = 16;
/// Nodes up to which the end of each is told.
const NUM_TOLD: usize = 100;
const SPINNER: &str = "{prefix:<24!} {spinner} {msg}";

/// Draws bars on standard error.
#[derive(Debug)]
pub struct Live {
    bars: MultiProgress,
    running: BTreeMap<NodeName, (ProgressBar, Pace)>,
    teller: Teller,
    /// Counts the nodes by state, below the bars.
    total: ProgressBar,
    num_nodes: usize,
    states: BTreeMap<NodeName, &'static str>,
    started_ms: u64,
}

impl Default for Live {
    fn default() -> Self {
        Self::new()
    }
}

impl Live {
    /// Returns progress without bars yet.
    pub fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8));
        let total = bars.add(ProgressBar::new_spinner());
        total.set_style(style("{msg}"));
        let (running, states) = (BTreeMap::new(), BTreeMap::new());
        Self { bars, running, teller: Teller::default(), total, num_nodes: 0, states, started_ms: 0 }
    }

    fn say(&self, line: &str) {
        // Printing fails only when the terminal is gone.
        let _ = self.bars.println(line);
    }

    fn open_bar(&mut self, node: &NodeName) {
        if self.running.len() >= NUM_BARS {
            return;
        }
        let bar = self.bars.insert_before(&self.total, ProgressBar::new_spinner());
        bar.set_style(style(SPINNER));
        bar.set_prefix(node.to_string());
        bar.set_message("starts");
        bar.enable_steady_tick(Duration::from_millis(200));
        self.running.insert(node.clone(), (bar, Pace::default()));
    }
}

impl Live {
    /// Returns true for what the bars and the count below them show: starts always, and in a large run ends too.
    fn is_collapsed(&self, event: &RunEvent) -> bool {
        match event {
            RunEvent::Node { state: NodeState::Running { attempt }, .. } => *attempt == 1,
            RunEvent::Node { state: NodeState::Done { .. }, .. } => self.num_nodes > NUM_TOLD,
            _ => false,
        }
    }
}

/// Returns how many nodes are done and how many are in each state that a person may wait for or worry about.
fn counts(states: &BTreeMap<NodeName, &'static str>, num_nodes: usize) -> String {
    let num = |words: &[&str]| states.values().filter(|state| words.contains(state)).count();
    let done = num(&["done", "cached", "shared"]);
    let mut text = format!("{done} of {} nodes done", num_nodes.max(states.len()));
    for word in ["running", "sealing", "retrying", "failed", "blocked", "cached"] {
        if num(&[word]) > 0 {
            text.push_str(&format!(", {} {word}", num(&[word])));
        }
    }
    text
}

/// Templates are constants of this file; one that does not parse would show in the first run by hand.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Progress for Live {
    fn begin(&mut self, num_nodes: usize) {
        self.num_nodes = num_nodes;
    }

    fn run_event(&mut self, ts_ms: u64, event: &RunEvent) {
        let lines = self.teller.tell(ts_ms, event);
        if !self.is_collapsed(event) {
            lines.iter().for_each(|line| self.say(line));
        }
        let RunEvent::Node { node, state, .. } = event else {
            self.started_ms = if self.started_ms == 0 { ts_ms } else { self.started_ms };
            return;
        };
        self.states.insert(node.clone(), state.word());
        match state {
            NodeState::Running { .. } => self.open_bar(node),
            NodeState::Sealing { .. } => {
                if let Some((bar, _)) = self.running.get(node) {
                    bar.set_message("sealing");
                }
            }
            _ => {
                if let Some((bar, _)) = self.running.remove(node) {
                    bar.finish_and_clear();
                    self.bars.remove(&bar);
                }
            }
        }
    }

    fn worker_event(&mut self, node: &NodeName, _attempt: u32, event: &WorkerEvent) {
        if let Some((bar, pace)) = self.running.get_mut(node) {
            let had_total = pace.total > 0;
            pace.take(event);
            if pace.total > 0 && !had_total {
                bar.disable_steady_tick();
                bar.set_style(style(BAR));
            }
        }
        if let Some(line) = remark(node, event) {
            self.say(&line);
        }
    }

    fn note(&mut self, message: &str) {
        self.say(message);
    }

    fn tick(&mut self, now_ms: u64) {
        let seconds = now_ms.saturating_sub(self.started_ms) as f64 / 1000.0;
        self.total.set_message(format!("{}  {}", counts(&self.states, self.num_nodes), duration(seconds)));
        for (bar, pace) in self.running.values() {
            if pace.total == 0 {
                continue;
            }
            bar.set_length(pace.total);
            bar.set_position(pace.step);
            let left = pace.eta_seconds().map_or(String::new(), |seconds| format!("  {} left", duration(seconds)));
            bar.set_message(format!("{}/{}  {}{left}", pace.step, pace.total, pace.numbers()));
        }
    }

    fn summary(&mut self, summary: &Summary) {
        if let Some(line) = self.teller.flush() {
            self.say(&line);
        }
        self.running.values().for_each(|(bar, _)| bar.finish_and_clear());
        self.total.finish_and_clear();
        // An interrupted draw may fail; the summary below does not depend on it.
        let _ = self.bars.clear();
        summary.print();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_below_counts_what_matters() {
        let states = [("a", "cached"), ("b", "done"), ("c", "running"), ("d", "ready"), ("e", "failed")];
        let states = states.map(|(node, state)| (NodeName(node.into()), state)).into_iter().collect();
        assert_eq!(counts(&states, 9), "2 of 9 nodes done, 1 running, 1 failed, 1 cached");
    }

    #[test]
    fn the_templates_parse() {
        for template in [BAR, SPINNER] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
