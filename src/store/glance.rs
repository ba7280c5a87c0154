//! A quick look at a journal: the same [`RunView`] as a careful reading gives, many times faster on a long one.
//!
//! Hashes are not checked, ordinary lines are read by their layout, and only the last line of a node is understood in
//! full. For `status` and `runs`, which look at journals of ten thousand nodes while a run goes on; nothing is decided
//! from it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::str::FromStr;

use deepgen_contract::id::{Fingerprint, NodeName};
use memchr::{memchr, memchr_iter};
use serde::Deserialize;

use super::journal::{JOURNAL_FILE, JournalRecord};
use super::runs::{NodeView, RunView};
use crate::run::event::{NodeState, Origin, RunEvent};

/// Bytes of the two lines that a node has at least, about.
const LINES_OF_A_NODE: usize = 600;

/// What is needed of a line.
#[derive(Debug, PartialEq, Deserialize)]
struct Line<'a> {
    seq: u64,
    ts_ms: u64,
    #[serde(borrow)]
    event: Event<'a>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Event<'a> {
    kind: &'a str,
    #[serde(borrow)]
    node: Option<Cow<'a, str>>,
    fingerprint: Option<&'a str>,
    #[serde(borrow)]
    state: Option<State<'a>>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct State<'a> {
    state: &'a str,
    attempt: Option<u32>,
    #[serde(borrow)]
    origin: Option<How<'a>>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct How<'a> {
    how: &'a str,
    attempt: Option<u32>,
}

/// What is remembered of a node while lines go by.
struct Seen<'a> {
    line: &'a str,
    ts_ms: u64,
    state: State<'a>,
    fingerprint: &'a str,
    started_ms: Option<u64>,
    failures: u32,
}

/// Reads the journal of a run; a last line that is not finished is left out.
///
/// # Errors
/// When it cannot be read or is of another program.
pub fn glance(run_dir: &Path) -> io::Result<RunView> {
    let path = run_dir.join(JOURNAL_FILE);
    let named = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
    let text = std::fs::read(&path).map_err(|error| io::Error::new(error.kind(), named(error.to_string())))?;
    let text = String::from_utf8(text).map_err(|error| named(error.to_string()))?;
    let end = text.rfind('\n').map_or(0, |at| at + 1);
    let mut view = RunView::default();
    let mut nodes: Vec<Seen<'_>> = Vec::with_capacity(end / LINES_OF_A_NODE);
    let mut places: HashMap<Cow<'_, str>, usize> = HashMap::with_capacity(end / LINES_OF_A_NODE);
    let ends = memchr_iter(b'\n', &text.as_bytes()[..end]);
    for (start, end) in std::iter::once(0).chain(ends.clone().map(|at| at + 1)).zip(ends) {
        let line = &text[start..end];
        let parsed = match ordinary(line) {
            Some(parsed) => parsed,
            None => serde_json::from_str(line).map_err(|error| named(error.to_string()))?,
        };
        match (parsed.event.node, parsed.event.state, parsed.event.fingerprint) {
            (Some(node), Some(state), Some(fingerprint)) if parsed.event.kind == "node" => {
                let ts_ms = parsed.ts_ms;
                let before = places.get(&node).map(|at| &mut nodes[*at]);
                let is_failure = matches!(state.state, "retrying" | "failed");
                let starts = state.state == "running";
                match before {
                    // A resumed run tells again what it found done; that is no new transition.
                    Some(before) if state.state == "done" && is_same_end(&before.state, &state) => {}
                    Some(before) => {
                        before.failures += u32::from(is_failure);
                        before.started_ms = before.started_ms.or(starts.then_some(ts_ms));
                        (before.line, before.ts_ms, before.state, before.fingerprint) =
                            (line, ts_ms, state, fingerprint);
                    }
                    None => {
                        let (failures, started_ms) = (u32::from(is_failure), starts.then_some(ts_ms));
                        places.insert(node, nodes.len());
                        nodes.push(Seen { line, ts_ms, state, fingerprint, started_ms, failures });
                    }
                }
                (view.last_seq, view.updated_ms) = (parsed.seq, parsed.ts_ms);
            }
            _ => view.apply(&record(line).map_err(named)?),
        }
    }
    let viewed = |(name, at): (Cow<'_, str>, usize)| {
        let seen = &nodes[at];
        let state = match direct(&seen.state) {
            Some(state) => state,
            None => match record(seen.line)?.event {
                RunEvent::Node { state, .. } => state,
                other => return Err(format!("{other:?} is no event of a node")),
            },
        };
        let fingerprint = Fingerprint::parse(seen.fingerprint).map_err(|error| error.to_string())?;
        let Seen { ts_ms: since_ms, started_ms, failures, .. } = *seen;
        Ok((NodeName(name.into_owned()), NodeView { fingerprint, state, since_ms, started_ms, failures }))
    };
    // A map is made fast of what is in order, and what is small is put in order fast.
    let mut ordered: Vec<(Cow<'_, str>, usize)> = places.into_iter().collect();
    ordered.sort_unstable();
    view.nodes = ordered.into_iter().map(viewed).collect::<Result<_, _>>().map_err(named)?;
    Ok(view)
}

/// Reads a line of a node that goes its way, if it is laid out exactly as this version writes it.
fn ordinary(line: &str) -> Option<Line<'_>> {
    let mut rest = Rest(line);
    rest.skip(r#"{"version":1,"seq":"#)?;
    let seq = rest.number()?;
    rest.skip(r#","ts_ms":"#)?;
    let ts_ms = rest.number()?;
    rest.skip(r#","prev":""#)?;
    rest.text()?;
    rest.skip(r#","event":{"kind":"node","node":""#)?;
    let node = rest.text()?;
    rest.skip(r#","fingerprint":""#)?;
    let fingerprint = rest.text()?;
    rest.skip(r#","state":{"state":""#)?;
    let word = rest.text()?;
    let (mut attempt, mut origin) = (None, None);
    match word {
        "waiting" | "ready" => {}
        "running" | "sealing" => attempt = Some(rest.attempt()?),
        "done" => {
            rest.skip(r#","origin":{"how":""#)?;
            origin = Some(match rest.text()? {
                how @ "cached" => How { how, attempt: None },
                how @ "ran" => How { how, attempt: Some(rest.attempt()?) },
                _ => return None,
            });
            rest.skip("}")?;
        }
        _ => return None,
    }
    rest.skip(r#"}},"hash":""#)?;
    rest.text()?;
    let state = State { state: word, attempt, origin };
    let event = Event { kind: "node", node: Some(node.into()), fingerprint: Some(fingerprint), state: Some(state) };
    (rest.0 == "}").then_some(Line { seq, ts_ms, event })
}

/// What is left of a line.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn skip(&mut self, text: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    fn number<T: FromStr>(&mut self) -> Option<T> {
        let (digits, rest) = self.0.split_at(self.0.bytes().position(|byte| !byte.is_ascii_digit())?);
        self.0 = rest;
        digits.parse().ok()
    }

    /// Takes what stands before the next quote; text with an escape in it is not taken.
    fn text(&mut self) -> Option<&'a str> {
        let end = memchr(b'"', self.0.as_bytes())?;
        let text = &self.0[..end];
        self.0 = &self.0[end + 1..];
        memchr(b'\\', text.as_bytes()).is_none().then_some(text)
    }

    fn attempt(&mut self) -> Option<u32> {
        self.skip(r#","attempt":"#)?;
        self.number()
    }
}

/// A line with everything in it; its hash is left over.
fn record(line: &str) -> Result<JournalRecord, String> {
    serde_json::from_str(line).map_err(|error| error.to_string())
}

fn is_same_end(before: &State<'_>, now: &State<'_>) -> bool {
    let parts = |state: &State<'_>| (direct(state), state.origin.as_ref().map(|origin| origin.how.to_owned()));
    before.state == "done" && parts(before) == parts(now)
}

/// Returns a state that holds no more than a word and numbers.
fn direct(state: &State<'_>) -> Option<NodeState> {
    match (state.state, state.attempt, &state.origin) {
        ("waiting", ..) => Some(NodeState::Waiting),
        ("ready", ..) => Some(NodeState::Ready),
        ("running", Some(attempt), _) => Some(NodeState::Running { attempt }),
        ("sealing", Some(attempt), _) => Some(NodeState::Sealing { attempt }),
        ("done", _, Some(How { how: "cached", .. })) => Some(NodeState::Done { origin: Origin::Cached }),
        ("done", _, Some(How { how: "ran", attempt: Some(attempt) })) => {
            Some(NodeState::Done { origin: Origin::Ran { attempt: *attempt } })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::event::{Failure, RunResult};
    use crate::store::journal::Journal;
    use deepgen_contract::job::FailureCause;

    #[test]
    fn a_glance_sees_what_a_careful_reading_sees() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join(JOURNAL_FILE)).unwrap();
        let node = |name: &str, state| RunEvent::Node {
            node: NodeName(name.into()),
            fingerprint: Fingerprint([name.len() as u8; 32]),
            state,
        };
        let failure = || Failure { cause: FailureCause::Io, message: "a \"quoted\"\nline".into() };
        let started = RunEvent::RunStarted {
            run: "r".into(),
            pipeline: "p".into(),
            profile: "tiny".into(),
            seed: 1,
            plan: "x".into(),
            command: vec!["deepgen".into(), "run".into()],
            pid: 1,
            host: "h".into(),
        };
        let ran = NodeState::Done { origin: Origin::Ran { attempt: 2 } };
        let shared = NodeState::Done { origin: Origin::Shared { with: NodeName("a".into()) } };
        let batches = [
            vec![started, node("a", NodeState::Ready), node("a", NodeState::Running { attempt: 1 })],
            vec![node("a", NodeState::Retrying { attempt: 1, failure: failure(), until_ms: 9 })],
            vec![node("a", NodeState::Running { attempt: 2 }), node("a", NodeState::Sealing { attempt: 2 })],
            vec![node("a", ran.clone()), node("twin", shared), node("w/o \"x\"", NodeState::Running { attempt: 1 })],
            vec![RunEvent::RunResumed { pid: 2, host: "h".into() }, node("a", ran)],
            vec![node("w/o \"x\"", NodeState::Failed { attempt: 1, failure: failure() })],
            vec![node("child", NodeState::Blocked { by: NodeName("w/o \"x\"".into()) })],
            vec![RunEvent::RunFinished { result: RunResult::Failed }],
        ];
        for (at, events) in batches.iter().enumerate() {
            journal.append(events, 10 * (at as u64 + 1)).unwrap();
            assert_eq!(glance(dir.path()).unwrap(), RunView::read(dir.path()).unwrap(), "after batch {at}");
        }
    }

    #[test]
    fn ordinary_lines_are_read_by_their_layout_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL_FILE);
        let node = |name: &str, state| RunEvent::Node {
            node: NodeName(name.into()),
            fingerprint: Fingerprint([0xab; 32]),
            state,
        };
        let ran = NodeState::Done { origin: Origin::Ran { attempt: 12 } };
        let ordinary_states = [
            NodeState::Waiting,
            NodeState::Ready,
            NodeState::Running { attempt: 1 },
            NodeState::Sealing { attempt: 10 },
            NodeState::Done { origin: Origin::Cached },
            ran.clone(),
        ];
        let num_ordinary = ordinary_states.len();
        let mut events: Vec<RunEvent> = ordinary_states.map(|state| node("a[b=\u{e4}]", state)).into();
        let shared = NodeState::Done { origin: Origin::Shared { with: NodeName("a".into()) } };
        events.extend([node("a", shared), node("a", NodeState::Blocked { by: NodeName("b".into()) })]);
        events.extend([node("a\"", ran), RunEvent::RunFinished { result: RunResult::Done }]);
        Journal::open(&path).unwrap().append(&events, 5).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for (at, line) in text.lines().enumerate() {
            let by_layout = ordinary(line);
            assert_eq!(by_layout.is_some(), at < num_ordinary, "{line}");
            let Some(by_layout) = by_layout else { continue };
            assert_eq!(by_layout, serde_json::from_str(line).unwrap());
            for end in 0..line.len() {
                assert!(line.get(..end).and_then(ordinary).is_none(), "{end} bytes of {line}");
            }
        }
    }
}
