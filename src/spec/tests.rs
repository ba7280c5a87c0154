//! Tests of loading: what the fixture pipeline resolves to, and how each kind of mistake reads.

use std::collections::BTreeMap;
use std::path::PathBuf;

use deepgen_contract::id::NodeName;
use deepgen_contract::job::FrozenCache;
use deepgen_contract::settings::Settings;
use tempfile::TempDir;

use super::{Diagnostic, Overrides, Resolved, ResolvedNode, Style, check, load, load_sweep, render};

pub fn fixtures() -> PathBuf {
    PathBuf::from("tests/fixtures/spec")
}

pub fn overrides(profile: Option<&str>, set: &[&str]) -> Overrides {
    let set = set.iter().map(|&set| set.to_owned()).collect();
    Overrides { profile: profile.map(str::to_owned), set, ..Overrides::default() }
}

pub fn full(profile: Option<&str>, set: &[&str]) -> Resolved {
    load(&fixtures().join("pipelines/full.toml"), &overrides(profile, set)).unwrap_or_else(|problems| {
        panic!("{}", render(&problems, Style::Plain));
    })
}

pub fn node<'a>(resolved: &'a Resolved, name: &str) -> &'a ResolvedNode {
    resolved.node(&NodeName(name.to_owned())).unwrap_or_else(|| panic!("no node {name} in {:?}", names(resolved)))
}

pub fn names(resolved: &Resolved) -> Vec<&str> {
    resolved.nodes.iter().map(|node| node.name.0.as_str()).collect()
}

/// A project with the fixture's stages and the files given.
pub struct Project(TempDir);

impl Project {
    pub fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("stages")).unwrap();
        for entry in std::fs::read_dir(fixtures().join("stages")).unwrap() {
            let from = entry.unwrap().path();
            if from.is_file() {
                std::fs::copy(&from, folder.path().join("stages").join(from.file_name().unwrap())).unwrap();
            }
        }
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, problems: &[Diagnostic]) -> String {
        render(problems, Style::Plain).replace(&*self.0.path().to_string_lossy(), "PROJECT")
    }

    /// Loads a file that must be wrong, and returns what a person would read.
    pub fn problems(&self, name: &str, overrides: &Overrides) -> String {
        self.text(&load(&self.path(name), overrides).expect_err("the file is wrong"))
    }
}

fn problems_of(text: &str) -> String {
    Project::new(&[("pipelines/p.toml", text)]).problems("pipelines/p.toml", &Overrides::default())
}

pub fn text_of(settings: &Settings, pointer: &str) -> String {
    settings.to_value().unwrap().pointer(pointer).map_or_else(|| "absent".to_owned(), ToString::to_string)
}

#[test]
fn layers_merge_in_order_and_each_value_knows_its_origin() {
    let tiny = full(None, &[]);
    let sft = node(&tiny, "sft");
    assert_eq!(text_of(&sft.settings, "/optimizer/lr"), "0.0004", "the pipeline beats the stage's profile");
    assert_eq!(text_of(&sft.settings, "/image/size"), "32", "tiny builds on shapes");
    assert_eq!(text_of(&sft.settings, "/optimizer/weight_decay"), "0.05", "the stage's default stays");
    assert_eq!(sft.origins.get("optimizer.lr").unwrap().to_string(), "pipelines/full.toml:34");
    assert!(sft.origins.get("image.size").unwrap().to_string().ends_with("(profile shapes)"));
    assert!(sft.origins.get("train.max_iters").unwrap().to_string().ends_with("(profile tiny)"));
    assert_eq!((sft.seed, sft.retries, sft.threads), (42, 2, 2));
    let set = full(None, &["sft.optimizer.lr=1e-3"]);
    assert_eq!(text_of(&node(&set, "sft").settings, "/optimizer/lr"), "0.001", "--set beats all");
    assert_eq!(node(&set, "sft").origins.get("optimizer.lr").unwrap().to_string(), "command line");
    let paper = full(Some("paper"), &[]);
    assert_eq!(text_of(&node(&paper, "sft").settings, "/optimizer/lr"), "0.0004", "set holds in every profile");
    assert_eq!(text_of(&node(&paper, "sft").settings, "/train/max_iters"), "400000");
    assert_eq!((node(&paper, "sft").device.as_str(), node(&paper, "mix").device.as_str()), ("cuda", "cpu"));
    assert_eq!(full(None, &["pipeline.seed=7"]).seed, 7);
}

#[test]
fn a_table_whose_kind_changes_is_replaced_and_otherwise_merged() {
    let paper = full(Some("paper"), &[]);
    assert_eq!(
        node(&paper, "captions").settings.to_value().unwrap()["source"],
        serde_json::json!({"kind": "blip3o", "index": "/data/blip3o", "images": "/data/blip3o"})
    );
    let other = full(None, &["captions.source.path=other.txt"]);
    let path = text_of(&node(&other, "captions").settings, "/source/path");
    assert_eq!(path, "\"../../../other.txt\"", "relative to the working directory");
}

#[test]
fn axes_multiply_flow_along_edges_and_wire_ports() {
    let resolved = full(None, &[]);
    let images = ["[geneval,handoff-1]", "[geneval,handoff-2]", "[cvtg,handoff-1]", "[cvtg,handoff-2]"];
    for axes in images {
        let image = node(&resolved, &format!("images{axes}"));
        let score = node(&resolved, &format!("scores{axes}"));
        assert_eq!(score.inputs.get("images"), Some(&image.name));
        assert_eq!(
            text_of(&image.settings, "/benchmark"),
            text_of(&score.settings, "/benchmark"),
            "filled where unset"
        );
        assert!(axes.contains(&image.inputs.get("weights").unwrap().0));
    }
    assert_eq!(resolved.nodes.len(), 7 + 2 * images.len());
    let path = |name| text_of(&node(&resolved, name).settings, "/items/path");
    assert_eq!(path("images[cvtg,handoff-2]"), "\"data/cvtg.txt\"", "a table for some instances");
    assert_eq!(path("images[geneval,handoff-2]"), "\"data/geneval.txt\"");
    let set = full(None, &["images[handoff-1].batch=3"]);
    let batch = |name| text_of(&node(&set, name).settings, "/batch");
    assert_eq!([batch("images[cvtg,handoff-1]"), batch("images[cvtg,handoff-2]")], ["3", "48"]);
}

#[test]
fn equal_axes_join_and_a_named_value_is_no_axis_of_its_reader() {
    let text = r#"
        [pipeline]
        name = "p"
        [node.a]
        stage = "prepare"
        over = { source.path = ["x", "y"] }
        set = { source.kind = "prompts" }
        [node.b]
        stage = "prepare"
        over = { source.path = ["x", "y"] }
        set = { source.kind = "prompts", dedupe = true }
        [node.joined]
        stage = "mix"
        inputs = { a = "a", b = "b" }
        [node.chosen]
        stage = "mix"
        inputs = { a = "a[y]" }
    "#;
    let project = Project::new(&[("pipelines/p.toml", text)]);
    let resolved = load(&project.path("pipelines/p.toml"), &Overrides::default()).unwrap();
    assert_eq!(names(&resolved), ["a[x]", "a[y]", "b[x]", "b[y]", "joined[x]", "joined[y]", "chosen"]);
    assert_eq!(node(&resolved, "joined[y]").inputs.get("b").unwrap().0, "b[y]");
    assert_eq!(node(&resolved, "chosen").inputs.get("a").unwrap().0, "a[y]");
}

#[test]
fn nodes_stand_after_their_inputs_whatever_their_order_in_the_file() {
    let resolved = full(None, &[]);
    for (at, node) in resolved.nodes.iter().enumerate() {
        for input in node.inputs.values() {
            assert!(resolved.nodes[..at].iter().any(|before| &before.name == input), "{} before {input}", node.name);
        }
    }
}

#[test]
fn a_sweep_holds_shared_nodes_once_and_says_what_stands_for_what() {
    let sweep = load_sweep(&fixtures().join("experiments/architecture.toml"), &Overrides::default()).unwrap();
    let all = names(&sweep);
    for shared in ["base", "captions", "mix"] {
        assert_eq!(all.iter().filter(|name| name.starts_with(shared)).count(), 1);
    }
    assert!(all.contains(&"pretrain@deepgen") && all.contains(&"pretrain@w/o SCB"));
    assert!(!all.contains(&"pretrain@w/o VLM LoRA"), "it is the pretrain of the first variant");
    assert_eq!(all.iter().filter(|name| name.starts_with("sft@")).count(), 3);
    let variants = sweep.sweep.unwrap().variants;
    let name = |text: &str| NodeName(text.to_owned());
    assert_eq!(variants[2].nodes[&name("pretrain")], name("pretrain@deepgen"));
    assert_eq!(variants[2].nodes[&name("scores[geneval,handoff-2]")], name("scores[geneval,handoff-2]@w/o VLM LoRA"));
    assert_eq!(variants[1].nodes[&name("scores[geneval,handoff-1]")], name("scores[geneval,handoff-1]@w/o SCB"));
}

#[test]
fn axes_of_an_experiment_make_a_grid() {
    let text = r#"
        pipeline = "../pipelines/full.toml"
        compare = ["scores[geneval,handoff-2].overall"]
        [axes]
        "sft.optimizer.lr" = [1e-4, 2e-4]
        "pipeline.seed" = [1, 2]
    "#;
    let pipeline = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let project = Project::new(&[("experiments/grid.toml", text), ("pipelines/full.toml", &pipeline)]);
    let resolved = load(&project.path("experiments/grid.toml"), &Overrides::default()).unwrap();
    let sweep = resolved.sweep.as_ref().unwrap();
    let names: Vec<&str> = sweep.variants.iter().map(|variant| variant.name.as_str()).collect();
    assert_eq!(names, ["lr=0.0001, seed=1", "lr=0.0001, seed=2", "lr=0.0002, seed=1", "lr=0.0002, seed=2"]);
    assert_eq!(resolved.node(&NodeName("sft@lr=0.0002, seed=2".into())).unwrap().seed, 2);
}

#[test]
fn all_problems_of_a_file_are_shown_at_once() {
    insta::assert_snapshot!(problems_of(
        r#"[pipeline]
name = "wrong"
sed = 3
profile = "tinny"

[node.base]
stage = "import"
set = { model.vae.latent_chanels = 16, scheduler_shift = "3" }

[node.mix]
stage = "mixx"

[node.captions]
stage = "prepare"

[node.pretrain]
stage = "pretrain"
inputs = { weights = "bsae", data = "captions", extra = "base" }
set = { optimizer.lr = "fast", train.sigma_dtype = "bf15", train.max_iters = -1, model.lora.kind = "adaptrs" }

[node.sft]
stage = "sft"
inputs = { weights = "base" }
slots = { gpus = 1 }
"#
    ));
}

#[test]
fn a_cycle_is_shown_whole() {
    insta::assert_snapshot!(problems_of(
        r#"[pipeline]
name = "round"

[node.sft]
stage = "sft"
inputs = { weights = "handoff", data = "mix" }

[node.mix]
stage = "mix"
inputs = { captions = "captions" }

[node.captions]
stage = "prepare"
set = { source = { kind = "prompts", path = "p.txt" } }

[node.handoff]
stage = "handoff"
inputs = { weights = "handoff", checkpoint = "sft" }
"#
    ));
}

#[test]
fn two_nodes_of_one_name_are_shown_with_both_lines() {
    insta::assert_snapshot!(problems_of(
        r#"[pipeline]
name = "twice"

[node.base]
stage = "import"

[node.mix]
stage = "mix"
inputs = { captions = "base" }

[node.base]
stage = "import"
retries = 1
retries = 2
"#
    ));
}

#[test]
fn syntax_errors_are_shown_where_they_are() {
    insta::assert_snapshot!(problems_of("[pipeline]\nname = \"p\nseed = 4x2\n\n[node.base]\nstage = \"import\"\n"));
}

#[test]
fn mistakes_on_the_command_line_are_shown_like_those_in_files() {
    let pipeline = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let project = Project::new(&[("pipelines/full.toml", &pipeline)]);
    let set = [
        "stf.optimizer.lr=1",
        "sft.optimizer.lrr=1",
        "sft.optimizer",
        "sft.train.max_iters=[1,",
        "images[gneval].batch=2",
        "sft.train.log_every=often",
    ];
    insta::assert_snapshot!(project.problems("pipelines/full.toml", &overrides(Some("papr"), &set)));
}

#[test]
fn mistakes_in_a_stage_file_are_shown_once_however_many_nodes_use_it() {
    let stage = "kind = \"handoff\"\nlora = \"merged\"\ndtype = \"bf16\"\n[profile.small]\ndtyp = \"f32\"\n";
    let pipeline = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let project = Project::new(&[("pipelines/full.toml", &pipeline), ("stages/handoff.toml", stage)]);
    insta::assert_snapshot!(project.problems("pipelines/full.toml", &Overrides::default()));
    assert_eq!(check(&project.path("stages/handoff.toml"), &Overrides::default()).len(), 2, "all profiles are checked");
    assert_eq!(check(&project.path("pipelines/full.toml"), &Overrides::default()).len(), 2);
}

#[test]
fn mistakes_in_an_experiment_are_shown_with_their_lines() {
    let text = "pipelin = \"pipelines/full.toml\"\ncompare = [\"scores\"]\n\n[[variant]]\nset = { sft = 1 }\n";
    let other = "pipeline = \"../pipelines/ful.toml\"\n[[variant]]\nname = \"a\"\n";
    let third = "pipeline = \"../pipelines/full.toml\"\ncompare = [\"scores[genval,handoff-2].overall\"]\n\n[[variant]]\n\
                 name = \"a\"\nset = { \"sft.model.bridge.layer\" = \"last\" }\n";
    let pipeline = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let files = [("e/a.toml", text), ("e/b.toml", other), ("e/c.toml", third), ("pipelines/full.toml", &*pipeline)];
    let project = Project::new(&files);
    let all = ["e/a.toml", "e/b.toml", "e/c.toml"].map(|name| project.problems(name, &Overrides::default()));
    insta::assert_snapshot!(all.join("\n----\n"));
}

#[test]
fn a_file_that_is_not_there_names_its_neighbour() {
    let project = Project::new(&[("pipelines/full.toml", "")]);
    let problems = load(&project.path("pipelines/ful.toml"), &Overrides::default()).unwrap_err();
    assert_eq!(problems[0].help.as_deref(), Some("did you mean `full.toml`?"));
    let sweep = load_sweep(&fixtures().join("pipelines/full.toml"), &Overrides::default()).unwrap_err();
    assert!(sweep[0].message.contains("is a pipeline, not an experiment"));
}

#[test]
fn a_mixture_knows_only_members_that_are_its_inputs() {
    let text = problems_of(
        "[pipeline]\nname = \"p\"\n[node.captions]\nstage = \"prepare\"\n\
         set = { source = { kind = \"prompts\", path = \"p.txt\" } }\n[node.mix]\nstage = \"mix\"\n\
         inputs = { captions = \"captions\" }\nset = { members.caption.weight = 2.0 }\n",
    );
    assert!(
        text.contains("`members.caption` is no input of `mix`") && text.contains("did you mean `captions`?"),
        "{text}"
    );
}

#[test]
fn a_bridge_that_does_not_fit_its_decoder_is_found_before_anything_starts() {
    let file = fixtures().join("pipelines/full.toml");
    let problems = load(&file, &overrides(None, &["sft.model.bridge.layers=rule"])).unwrap_err();
    let text = render(&problems, Style::Plain);
    assert!(text.contains("the model of `sft` cannot be built") && text.contains("32 to 37 layers"), "{text}");
}

#[test]
fn the_files_of_this_project_have_no_problems() {
    let mut num = 0;
    for folder in ["stages", "pipelines", "experiments"] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|end| end == "toml") {
                let problems = check(&path, &Overrides::default());
                assert!(problems.is_empty(), "{}:\n{}", path.display(), render(&problems, Style::Plain));
                num += 1;
            }
        }
    }
    assert!(num >= 10, "only {num} files were found");
}

#[test]
fn how_a_node_runs_is_read_merged_and_no_part_of_its_result() {
    let text = r#"
        [pipeline]
        name = "p"
        keep_going = false
        [executor.local]
        slots = { gpu = [2, 3], cpu = 4, memory = "64GiB", license = 1 }
        frozen_cache = { path = "../kept", size = "1.5GiB" }
        [node.a]
        stage = "prepare"
        set = { source = { kind = "prompts", path = "p.txt" } }
        over = { nominal_size = [1, 2] }
        [node.first]
        stage = "prepare"
        set = { source = { kind = "prompts", path = "q.txt" } }
        needs = ["a[2]"]
        [node.b]
        stage = "mix"
        inputs = { a = "a" }
        needs = ["first", "a"]
        retries = 3
        timeout = "2h30m"
        stall = "10m"
        priority = 5
        backoff = { first = "10s", most = "5m" }
        remedies = { non_finite = false }
        slots = { gpu = [3], memory = "512MiB", license = 1 }
        [profile.tiny.node.b]
        backoff.factor = 3
        remedies.lost = false
        [node."b[2]"]
        slots = { cpu = 0.5 }
        stall = 0
    "#;
    let project = Project::new(&[("pipelines/p.toml", text)]);
    let resolved = load(&project.path("pipelines/p.toml"), &Overrides::default()).unwrap();
    assert!(!resolved.keep_going);
    assert_eq!(resolved.executor.slot_ids["gpu"], [2, 3]);
    assert_eq!((resolved.executor.slots["gpu"], resolved.executor.slots["memory"]), (2.0, 64.0));
    let kept = FrozenCache { path: "kept".into(), max_bytes: 3 << 29 };
    assert_eq!(resolved.executor.frozen_cache, Some(kept));
    let one = node(&resolved, "b[1]");
    assert_eq!((one.retries, one.priority, one.timeout_s, one.stall_s), (3, 5, Some(9000.0), Some(600.0)));
    assert_eq!((one.backoff.first_s, one.backoff.factor, one.backoff.most_s), (10.0, 3.0, 300.0));
    assert_eq!([one.remedies.out_of_memory, one.remedies.non_finite, one.remedies.lost], [true, false, false]);
    assert_eq!(
        (&one.slot_ids["gpu"], one.slots.get("gpu"), one.slots.get("memory")),
        (&vec![3], Some(&1.0), Some(&0.5))
    );
    let needs = |name| node(&resolved, name).needs.iter().map(|need| need.0.as_str()).collect::<Vec<_>>();
    assert_eq!(
        (needs("b[1]"), needs("b[2]"), needs("first")),
        (vec!["a[1]", "first"], vec!["a[2]", "first"], vec!["a[2]"])
    );
    let two = node(&resolved, "b[2]");
    assert_eq!((two.stall_s, two.slots.len(), two.slot_ids.len()), (None, 1, 0));

    let saved = serde_json::to_string(&resolved).unwrap();
    // The text of the files is kept with the plan.
    let without_sources = Resolved { sources: BTreeMap::new(), ..resolved.clone() };
    assert_eq!(serde_json::from_str::<Resolved>(&saved).unwrap(), without_sources);
    let plain = serde_json::to_value(node(&full(None, &[]), "sft")).unwrap();
    let written = plain.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>();
    assert!(!written.contains(&"needs") && written.contains(&"retries"), "a plan of before reads: {written:?}");
    assert_eq!(serde_json::from_value::<ResolvedNode>(plain).unwrap(), *node(&full(None, &[]), "sft"));
}

#[test]
fn slots_and_needs_that_cannot_be_had_are_shown() {
    let text = "[pipeline]\nname = \"p\"\n[executor.local]\nslots = { gpu = [2, 3], cpu = 4, memory = \"64GB\" }\n\
                [node.a]\nstage = \"prepare\"\nset = { source = { kind = \"prompts\", path = \"p.txt\" } }\n\
                slots = { gpu = [0] }\nneeds = [\"b\", \"c\"]\n\
                [node.b]\nstage = \"mix\"\ninputs = { a = \"a\" }\ntimeout = \"2 hours\"\nstall = -1\nremedies = { nan = true }\n\
                slots = { cpu = 5, cqu = 1 }\nbackoff = { factor = 0.5 }\n";
    insta::assert_snapshot!(problems_of(text));
}
