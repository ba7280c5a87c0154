//! Progress for pipes and logs: a line per change, a line per running node now and then, no escape codes.

use std::collections::BTreeMap;
use std::io::Write;

use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use deepgen_contract::id::NodeName;

use super::format::{count, duration};
use super::pace::Pace;
use super::progress::{Progress, Summary};
use crate::run::event::{NodeState, Origin, RunEvent};

/// Time between two position lines of a node.
const LINE_EVERY_MS: u64 = 10_000;

/// Writes lines to standard error.
#[derive(Debug, Default)]
pub struct Plain {
    is_quiet: bool,
    teller: Teller,
    running: BTreeMap<NodeName, Running>,
}

#[derive(Debug, Default)]
struct Running {
    pace: Pace,
    line_ms: u64,
}

impl Plain {
    /// Returns progress that tells everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns progress that tells of failures and the end only.
    pub fn quiet() -> Self {
        Self { is_quiet: true, ..Self::default() }
    }

    fn say(&self, line: &str) {
        if !self.is_quiet {
            // The terminal may have gone; that must not stop the run.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

impl Progress for Plain {
    fn run_event(&mut self, ts_ms: u64, event: &RunEvent) {
        if let RunEvent::Node { node, state, .. } = event {
            match state {
                NodeState::Running { .. } => {
                    self.running.insert(node.clone(), Running { line_ms: ts_ms, ..Running::default() });
                }
                state if !state.is_active() => drop(self.running.remove(node)),
                _ => {}
            }
        }
        for line in self.teller.tell(ts_ms, event) {
            self.say(&line);
        }
    }

    fn worker_event(&mut self, node: &NodeName, _attempt: u32, event: &WorkerEvent) {
        if let Some(running) = self.running.get_mut(node) {
            running.pace.take(event);
        }
        if let Some(line) = remark(node, event) {
            self.say(&line);
        }
    }

    fn note(&mut self, message: &str) {
        self.say(message);
    }

    fn tick(&mut self, now_ms: u64) {
        let mut lines = Vec::new();
        for (node, running) in &mut self.running {
            if now_ms.saturating_sub(running.line_ms) >= LINE_EVERY_MS && running.pace.total > 0 {
                running.line_ms = now_ms;
                lines.push(format!("{node}: {}", running.pace.line()));
            }
        }
        lines.iter().for_each(|line| self.say(line));
    }

    fn summary(&mut self, summary: &Summary) {
        self.teller.flush().iter().for_each(|line| self.say(line));
        summary.print();
    }
}

/// Returns the line for something a worker wants people to know.
pub(super) fn remark(node: &NodeName, event: &WorkerEvent) -> Option<String> {
    match &event.event {
        WorkerEventKind::Warning { message } => Some(format!("{node}: warning: {message}")),
        WorkerEventKind::Resumed { step, .. } => Some(format!("{node}: goes on from step {step}")),
        _ => None,
    }
}

/// Turns run events into lines; many cached nodes become one line.
#[derive(Debug, Default)]
pub(super) struct Teller {
    num_cached: usize,
    started_ms: BTreeMap<NodeName, u64>,
}

impl Teller {
    /// Returns the line about nodes that were counted and not told of yet.
    pub(super) fn flush(&mut self) -> Option<String> {
        let num = std::mem::take(&mut self.num_cached);
        (num > 0).then(|| format!("{} cached", count(num, "node")))
    }

    /// Returns the lines for an event.
    pub(super) fn tell(&mut self, ts_ms: u64, event: &RunEvent) -> Vec<String> {
        if let RunEvent::Node { state: NodeState::Done { origin: Origin::Cached }, .. } = event {
            self.num_cached += 1;
            return Vec::new();
        }
        let line = match event {
            RunEvent::RunStarted { run, pipeline, profile, .. } => {
                Some(format!("run {run}: {pipeline}, profile {profile}"))
            }
            RunEvent::RunResumed { .. } => Some("goes on with a run that was cut short".into()),
            RunEvent::RunFinished { .. } => None,
            RunEvent::Node { node, state, .. } => self.tell_node(ts_ms, node, state),
        };
        // Waiting for a slot says nothing about the cached nodes before it.
        let Some(line) = line else { return Vec::new() };
        self.flush().into_iter().chain([line]).collect()
    }

    fn tell_node(&mut self, ts_ms: u64, node: &NodeName, state: &NodeState) -> Option<String> {
        let took = |started: Option<u64>| {
            started.map_or(String::new(), |ms| format!(" in {}", duration(ts_ms.saturating_sub(ms) as f64 / 1000.0)))
        };
        match state {
            NodeState::Waiting | NodeState::Ready => None,
            NodeState::Running { attempt } => {
                self.started_ms.insert(node.clone(), ts_ms);
                let attempt = if *attempt > 1 { format!(" (attempt {attempt})") } else { String::new() };
                Some(format!("{node}: started{attempt}"))
            }
            NodeState::Sealing { .. } => None,
            NodeState::Retrying { failure, attempt, until_ms } => Some(format!(
                "{node}: attempt {attempt} failed: {failure}; again in {}",
                duration(until_ms.saturating_sub(ts_ms) as f64 / 1000.0)
            )),
            NodeState::Done { origin: Origin::Shared { with } } => Some(format!("{node}: same as {with}")),
            NodeState::Done { .. } => Some(format!("{node}: done{}", took(self.started_ms.remove(node)))),
            NodeState::Failed { failure, .. } => Some(format!("{node}: failed: {failure}")),
            NodeState::Blocked { by } => Some(format!("{node}: blocked by {by}")),
            NodeState::Stopped { step: Some(step), .. } => Some(format!("{node}: stopped at step {step}")),
            NodeState::Stopped { step: None, .. } => Some(format!("{node}: stopped")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::id::Fingerprint;

    fn node(name: &str, state: NodeState) -> RunEvent {
        RunEvent::Node { node: NodeName(name.into()), fingerprint: Fingerprint([0; 32]), state }
    }

    #[test]
    fn cached_nodes_are_told_of_in_one_line() {
        let mut teller = Teller::default();
        let cached = NodeState::Done { origin: Origin::Cached };
        assert!(teller.tell(0, &node("a", cached.clone())).is_empty());
        assert!(teller.tell(0, &node("b", cached)).is_empty());
        assert!(teller.tell(0, &node("c", NodeState::Ready)).is_empty());
        assert_eq!(
            teller.tell(0, &node("c", NodeState::Running { attempt: 2 })),
            ["2 nodes cached", "c: started (attempt 2)"]
        );
        assert!(teller.tell(900, &node("c", NodeState::Sealing { attempt: 2 })).is_empty());
        let done = NodeState::Done { origin: Origin::Ran { attempt: 2 } };
        assert_eq!(teller.tell(1500, &node("c", done)), ["c: done in 1.5 s"]);
    }
}
