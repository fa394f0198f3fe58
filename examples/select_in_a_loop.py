"""Select 4 of 16 candidates a step in a plain torch loop."""

import torch
from gradient_selectors import FilterThenWeight, SelectionEngine
from mixture import candidates, make_model, target_batches, test_loss

model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
engine = SelectionEngine(model, optimizer, FilterThenWeight(batch_size=4), target=target_batches())
for step in range(100):
    decision = engine.backward(candidates(step))  # in place of loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: trained on candidates {decision.selected}, test loss {test_loss(model):.3f}")
print(f"test loss {test_loss(model):.3f}")
