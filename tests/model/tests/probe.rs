//! x
use petra_model::*;
#[test]
fn probe() {
    let which: usize = std::env::var("W").unwrap().parse().unwrap();
    let mut config = petra_model::configurations::ALL[which];
    if let Ok(n) = std::env::var("N") { config.collectors = n.parse().unwrap(); }
    if std::env::var("R").is_ok() { config.resolving = true; }
    if let Ok(n) = std::env::var("C") { config.clones = n.parse().unwrap(); }
    let mut model = Model::new(config);
    if std::env::var("M").is_ok() { model.mutation = Some(Mutation::PurgedPinnedIsIgnored); }
    if std::env::var("L").is_ok() { model.mutation = Some(Mutation::CollectorReadsGravesLast); }
    let t = std::time::Instant::now();
    let e = explore(&model, &Property::ALL, model.config.goals, 2);
    println!("{}: {} states {} steps depth {} missed {:?} {:?}", config.name, e.states, e.steps, e.depth, e.missed, t.elapsed());
    if let Some(v) = e.violation { println!("{v:?}"); }
}
