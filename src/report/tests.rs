//! Tests of whole reports over runs on disk: what is shown, that it is escaped, and that nothing comes from outside.

use std::collections::BTreeSet;

use super::data::SinceLast;
use super::fixture::{self, Fixture, Story};
use super::{
    ReportData, curves, dag, differences, provenance, read, render, sample_grid, score_table, sweep_table, trouble,
};
use crate::compare::RunFacts;

const CALM: Story = Story { cached: &["base", "captions", "edits"], failing: None, words: "as a named setting" };
const HOSTILE: Story = Story {
    cached: &[],
    failing: Some("sft"),
    words: "<script>alert('x')</script> \"quoted\" & <img src=http://example.org/x.png>",
};

fn page(fixture: &Fixture) -> String {
    render(&read(&fixture.run_dir, &fixture.store).unwrap())
}

/// Leaves a page for a person to look at: `DEEPGEN_REPORT_OUT=/tmp cargo test -p deepgen --lib report`.
fn keep(name: &str, page: &str) {
    if let Ok(folder) = std::env::var("DEEPGEN_REPORT_OUT") {
        std::fs::write(format!("{folder}/{name}.html"), page).unwrap();
    }
}

/// Replaces what differs from machine to machine or says nothing: images and hashes.
fn redacted(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("data:image/png;base64,") {
        out.push_str(&rest[..at]);
        out.push_str("[image]");
        rest = &rest[at..];
        rest = &rest[rest.find('"').unwrap()..];
    }
    out.push_str(rest);
    let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let mut plain = String::new();
    for word in out.split_inclusive(|c: char| !is_hex(c)) {
        let digits = word.trim_end_matches(|c: char| !is_hex(c));
        match digits.len() {
            12.. => plain.push_str(&format!("[hash]{}", &word[digits.len()..])),
            _ => plain.push_str(word),
        }
    }
    plain
}

#[test]
fn a_report_needs_nothing_from_outside_and_its_links_lead_somewhere() {
    let fixture = fixture::run(&CALM);
    let page = page(&fixture);
    keep("full", &page);
    let links = page.matches("href=\"").count();
    assert_eq!(links, page.matches("href=\"#").count(), "every link stays on the page");
    assert_eq!(page.matches("src=\"").count(), page.matches("src=\"data:image/png;base64,").count());
    for word in ["http:", "https:", "@import", "url(", "<link", "src='"] {
        assert!(!page.contains(word), "{word}");
    }
    let after = |mark: &str| -> BTreeSet<String> {
        page.split(mark).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
    };
    let ids = after(" id=\"");
    let dangling: Vec<String> = after("href=\"#").difference(&ids).cloned().collect();
    assert!(dangling.is_empty(), "{dangling:?}");
    assert_eq!(ids.len(), page.matches(" id=\"").count(), "an id is used once");
    let images = page.matches("<img ").count();
    assert_eq!(images, page.matches(" alt=\"").count());
    assert!(images >= 12 * 4 + 12 * 4, "{images}");
    assert_eq!(render(&read(&fixture.run_dir, &fixture.store).unwrap()), page, "the same run gives the same page");
}

#[test]
fn scores_are_shown_with_intervals_beside_published_numbers() {
    let fixture = fixture::run(&CALM);
    let data = read(&fixture.run_dir, &fixture.store).unwrap();
    insta::assert_snapshot!(redacted(&score_table::section(&data).unwrap().to_string()));
}

#[test]
fn prompts_are_rows_and_checkpoints_columns() {
    let fixture = fixture::run(&CALM);
    let data = read(&fixture.run_dir, &fixture.store).unwrap();
    let labels = |i: usize| data.grids[i].columns.iter().map(|column| column.label.as_str()).collect::<Vec<_>>();
    assert_eq!(labels(0), ["base (own encoder)", "handoff-1", "handoff-2", "handoff-3"]);
    assert_eq!(labels(1), ["handoff-1", "handoff-2", "handoff-3"]);
    let tags: Vec<&str> = data.grids[0].rows.iter().map(|row| row.tag.as_str()).collect();
    assert_eq!(tags.len(), 12);
    assert_eq!(tags.iter().filter(|tag| **tag == "position").count(), 4);
    assert!(data.grids[1].rows.iter().all(|row| row.source.is_some()));
    assert!(
        data.grids
            .iter()
            .flat_map(|grid| &grid.rows)
            .flat_map(|row| &row.cells)
            .all(|cell| { cell.as_ref().is_some_and(|cell| cell.mark.is_some()) })
    );
    let mut short = data.clone();
    short.grids.remove(0);
    short.grids[0].rows.truncate(2);
    insta::assert_snapshot!(redacted(&sample_grid::section(&short).unwrap().to_string()));
}

#[test]
fn curves_have_axes_words_and_numbers() {
    let fixture = fixture::run(&CALM);
    let mut data = read(&fixture.run_dir, &fixture.store).unwrap();
    let all = curves::section(&data).unwrap().to_string();
    assert_eq!(all.matches("class=\"stage\"").count(), 3);
    assert_eq!(all.matches("role=\"img\"").count(), all.matches("<desc>").count());
    assert!(all.contains("class=\"raw l1\""));
    data.nodes.retain(|node| node.name().0 == "rl");
    data.nodes[0].metrics.truncate(3);
    data.nodes[0].metrics.iter_mut().for_each(|row| row.values.retain(|name, _| name.starts_with("reward/")));
    insta::assert_snapshot!(curves::section(&data).unwrap().to_string());
}

#[test]
fn a_failed_run_says_what_failed_where_and_what_waits_for_it() {
    let fixture = fixture::run(&HOSTILE);
    let data = read(&fixture.run_dir, &fixture.store).unwrap();
    let page = render(&data);
    keep("failed", &page);
    let sft = data.nodes.iter().find(|node| node.name().0 == "sft").unwrap();
    assert_eq!(sft.metrics.len(), 9, "the curve of a failed node is that of its attempt");
    assert_eq!(sft.seconds, Some(96.4));
    insta::assert_snapshot!(redacted(&trouble::section(&data).unwrap().to_string()));
}

#[test]
fn nothing_that_was_read_becomes_markup() {
    let page = page(&fixture::run(&HOSTILE));
    assert_eq!(page.matches("<script>").count(), 1, "only the page's own");
    assert!(!page.contains("<img src=http"));
    // Message, log, note and prompt.
    assert!(page.matches("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &quot;quoted&quot; &amp;").count() >= 4);
}

#[test]
fn the_graph_shows_states_times_and_numbers() {
    let fixture = fixture::run(&HOSTILE);
    let mut data = read(&fixture.run_dir, &fixture.store).unwrap();
    let whole = dag::section(&data).to_string();
    assert_eq!(whole.matches("<a class=\"node ").count(), data.nodes.len());
    data.nodes.retain(|node| ["base", "sft", "handoff-1", "mix-sft", "handoff-2"].contains(&node.name().0.as_str()));
    insta::assert_snapshot!(redacted(&dag::section(&data).to_string()));
}

#[test]
fn a_sweep_is_compared_in_one_table() {
    let fixture = fixture::sweep(&CALM);
    let data = read(&fixture.run_dir, &fixture.store).unwrap();
    keep("sweep", &render(&data));
    insta::assert_snapshot!(redacted(&sweep_table::section(&data).unwrap().to_string()));
}

#[test]
fn provenance_names_what_was_set_and_how_to_make_it_again() {
    let fixture = fixture::run(&CALM);
    let data = read(&fixture.run_dir, &fixture.store).unwrap();
    let text = provenance::section(&data).to_string();
    assert!(text.contains("deepgen run pipelines/full.toml --set sft.train.max_iters=240"));
    assert!(text.contains("git checkout cdcdcd"));
    assert!(text.contains("uncommitted changes"));
    assert!(text.contains("<code>items.seed</code>") && text.contains("pipelines/full.toml:"));
    assert!(text.contains("an earlier run, as base") && text.contains("this run, as sft"));
    assert!(text.contains(&data.nodes[0].planned.fingerprint.to_string()));
}

#[test]
fn a_report_of_a_run_whose_results_are_gone_is_still_a_report() {
    let fixture = fixture::run(&CALM);
    std::fs::remove_dir_all(fixture.store.layout().store()).unwrap();
    let path = super::write(&fixture.run_dir, &fixture.store).unwrap();
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains("id=\"graph\"") && !page.contains("id=\"scores\""));
}

#[test]
fn what_sets_variants_and_runs_apart_is_told_by_its_cause() {
    let sweep = fixture::sweep(&CALM);
    let data = read(&sweep.run_dir, &sweep.store).unwrap();
    let text = differences::section(&data).unwrap().to_string();
    assert!(text.contains("Between the variants") && !text.contains("Since the run before"), "{text}");
    assert!(text.contains("model.bridge.layers"), "{text}");
    assert!(!text.contains("<td>handoff"), "a hand-off differs by its inputs alone: {text}");
    keep("sweep-differences", &page(&sweep));

    let run = fixture::run(&CALM);
    let mut data = read(&run.run_dir, &run.store).unwrap();
    assert!(differences::section(&data).is_none(), "nothing to compare with");
    let facts = |data: &ReportData| RunFacts {
        name: data.view.run.clone(),
        view: data.view.clone(),
        saved: data.saved.clone(),
        environment: None,
        manifests: data.nodes.iter().filter_map(|node| Some((node.name().clone(), node.manifest.clone()?))).collect(),
    };
    let now = facts(&data);
    let mut before = now.clone();
    let old = before.saved.plan.nodes.iter_mut().find(|planned| planned.node.name.0 == "sft").unwrap();
    old.node.settings["settings"]["optimizer"]["lr"] = 0.5.into();
    old.fingerprint.0[0] ^= 1;
    let diff = crate::compare::runs(&before, &now);
    data.previous = Some(SinceLast { run: "earlier".into(), started_ms: 0, diff });
    let text = differences::section(&data).unwrap().to_string();
    assert!(text.contains("optimizer.lr") && text.contains("0.5") && text.contains("Run earlier of 1970"), "{text}");
    keep("run-differences", &render(&data));
}
