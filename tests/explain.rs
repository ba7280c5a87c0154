//! Stories about explaining, told with the real program and a fake worker: why a node runs, what it costs, what a
//! person accepts, how two runs differ.

mod harness;

use harness::Project;
use serde_json::Value;

const PIPELINE: &str = "pipelines/small.toml";
const LR: [&str; 2] = ["--set", "sft.optimizer.lr=1e-4"];

/// Returns `plan --json` under some changes.
fn plan(project: &Project, changes: &[&str]) -> Value {
    let ran = project.deepgen(&[&["plan", PIPELINE, "--json"], changes].concat()).expect(0);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

fn node<'a>(plan: &'a Value, name: &str) -> &'a Value {
    plan["nodes"].as_array().unwrap().iter().find(|node| node["node"] == name).unwrap()
}

#[test]
fn a_plan_says_what_changed_from_what_to_what_and_what_it_will_cost() {
    let project = Project::new();
    project.deepgen(&["plan", PIPELINE]).expect(0).prints("never ran").prints("expected cost: unknown");
    project.run().expect(0);
    project.write("data/poems.txt", "a yellow cross\n");
    let changes = ["--set", "sft.optimizer.lr=1e-4", "--set", "sft.optimizer.eps=1e-9"];
    let ran = project.deepgen(&[&["plan", PIPELINE, "-v"], &changes[..]].concat()).expect(0);
    let ran = ran.prints("content changed: data/poems.txt").prints("optimizer.eps: 1e-8 -> 1e-9 and 1 more setting");
    let ran = ran.prints("sft differs from its newest result in").prints("  optimizer.lr: 0.00005 -> 0.0001");
    ran.prints("  content source.path: ").prints("expected cost: ").prints(" of work, 0.00 GPU-hours, ");

    let plan = plan(&project, &changes);
    let sft = node(&plan, "sft");
    assert_eq!(sft["why"]["kind"], "setting");
    assert_eq!((&sft["why"]["old"], &sft["why"]["new"]), (&"1e-8".into(), &"1e-9".into()));
    assert_eq!(sft["differences"].as_array().unwrap().len(), 3, "two settings and an input: {sft}");
    assert!(sft["cost"]["seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(node(&plan, "words")["verdict"], "cached");
    assert_eq!(plan["cost"]["unknown"], serde_json::json!([]));
}

#[test]
fn gpu_hours_that_are_too_many_or_unknown_start_nothing() {
    let project = Project::new();
    project.edit(PIPELINE, "device = \"cpu\"", "device = \"cuda\"");
    let guard = ["--max-gpu-hours", "5"];
    project.deepgen(&[&["run", PIPELINE], &guard[..]].concat()).expect(2).says("no earlier run tells").says("sft");
    assert!(!project.path("artifacts/runs").exists());
    project.run().expect(0);
    project.deepgen(&[&["plan", PIPELINE], &guard[..]].concat()).expect(0).prints("6 cached");
    project.deepgen(&[&["run", PIPELINE], &LR[..], &guard[..]].concat()).expect(0);
    // The same iterations a million times over, in hours.
    let long = ["--set", "sft.train.max_iters=400_000_000_000_000"];
    project.deepgen(&[&["plan", PIPELINE], &long[..], &guard[..]].concat()).expect(2).says("GPU-hours are expected");
    project.deepgen(&[&["run", PIPELINE], &long[..], &guard[..]].concat()).expect(2).says("nothing was started");
}

#[test]
fn an_accepted_change_reruns_nothing_and_can_be_taken_back() {
    let project = Project::new();
    project.deepgen(&["accept", "sft", PIPELINE]).expect(2).says("it never ran");
    project.run().expect(0);
    let results = project.results();
    project.deepgen(&["accept", "sft", PIPELINE]).expect(0).prints("nothing to accept");
    project.deepgen(&["accept", "sfd", PIPELINE]).expect(2).says("did you mean `sft`?");

    let accept = [&["accept", "sft", PIPELINE, "--note", "only a spelling"], &LR[..]].concat();
    project.deepgen(&accept).expect(0).prints("optimizer.lr: 0.00005 -> 0.0001");
    let plan_text = project.deepgen(&[&["plan", PIPELINE], &LR[..]].concat()).expect(0).prints("6 cached, 0 to run");
    plan_text.prints("accepted in place of");
    let explained = project.deepgen(&[&["explain", "sft", PIPELINE], &LR[..]].concat()).expect(0);
    explained.prints("accepted by ").prints("only a spelling").prints("optimizer.lr: 0.00005 -> 0.0001");
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("0 ran, 6 cached");
    assert_eq!(project.results(), results, "nothing was copied or made");
    // What follows is made from the accepted result, as before.
    let changed = [&["run", PIPELINE, "--set", "final.dtype=f32"], &LR[..]].concat();
    project.deepgen(&changed).expect(0).prints("1 ran, 5 cached");

    project.deepgen(&["accept", "--list"]).expect(0).prints("sft").prints("only a spelling");
    project.deepgen(&[&["accept", "sft", PIPELINE, "--revoke"], &LR[..]].concat()).expect(0).prints("no longer");
    project.deepgen(&["accept", "--list"]).expect(0).prints("taken back by");
    let again = project.deepgen(&[&["plan", PIPELINE], &LR[..]].concat()).expect(0);
    again.prints("optimizer.lr: 0.00005 -> 0.0001");
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("2 ran, 4 cached");
    let revoke_nothing = ["accept", "sft", PIPELINE, "--revoke"];
    project.deepgen(&revoke_nothing).expect(2).says("nothing was accepted");
}

#[test]
fn an_accepted_result_that_is_gone_is_made_again() {
    let project = Project::new();
    project.run().expect(0);
    project.deepgen(&[&["accept", "sft", PIPELINE], &LR[..]].concat()).expect(0);
    let fingerprint = project.manifests()["sft"]["fingerprint"].as_str().unwrap().to_owned();
    std::fs::remove_dir_all(project.path("artifacts/store").join(fingerprint)).unwrap();
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("2 ran, 4 cached");
}

#[test]
fn a_smoke_test_has_results_of_its_own_which_stand_for_no_real_ones() {
    let project = Project::new();
    project.deepgen(&["run", PIPELINE, "--smoke"]).expect(0).prints("6 ran");
    let explained = project.deepgen(&["explain", "sft", PIPELINE, "--smoke"]).expect(0).prints("cached");
    let line = explained.stdout.lines().find(|line| line.trim_start().starts_with("train.max_iters")).unwrap();
    assert!(line.contains(" 2 ") && line.ends_with("--smoke"), "{line}");
    project.deepgen(&["accept", "sft", PIPELINE]).expect(2).says("of a smoke test");
    project.run().expect(0).prints("3 ran, 3 cached");
    project.deepgen(&["run", PIPELINE, "--smoke"]).expect(0).prints("0 ran, 6 cached");
    // What is real is compared with what is real, however new the smoke test.
    let plan = plan(&project, &["--set", "sft.optimizer.lr=1e-4"]);
    assert_eq!(node(&plan, "sft")["differences"].as_array().unwrap().len(), 1);
}
