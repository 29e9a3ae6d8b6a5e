// What makes a component of gradio of the editor: it does what its value says, and its events tell what was pointed at.
const editor = createEditor(element, {
  onNote: (text) => {
    const status = document.querySelector("#status [role=status]");
    if (status) status.textContent = text;
  },
  onSelect: (request) => trigger("select", request),
});
const obey = {
  open: ({ photo, size, mask, hint }) => editor.open(photo, size, mask, hint),
  close: () => editor.close(),
  busy: () => editor.setBusy(true),
  idle: () => editor.setBusy(false),
  preview: ({ url }) => editor.preview(url),
  finish: ({ candidates }) => {
    editor.setBusy(false);
    editor.finish(candidates);
  },
  add: ({ mask, erase }) => editor.add(mask, erase),
};
const follow = () => obey[props.value?.do]?.(props.value);
watch("value", follow);
follow();
window.moebiusEditor = editor;
